#!/usr/bin/env bash
# Makes the study of results/study.md: pre-trains the models, tunes them, measures, draws.
#     results/study.sh                                        # days of two cores
#     SEEDS="1 2" JOBS=4 results/study.sh                     # two seeds, four jobs at a time
#     LIST=1 results/study.sh                                 # only list the jobs
# Settings behind the config go to every command. Run it again to go on after a stop.
set -e
shopt -s nullglob
export CONFIG=${1:-config/study.py} SETTINGS=${*:2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
name=$(basename "$CONFIG" .py)
export OUT=out/$name
seeds=${SEEDS:-1 2 3}
plain="--dataset=${name}_plain --meta_rate=0 --meta_attention=False"
layers=$(sed -n 's/^n_layer = \([0-9]*\).*/\1/p' "$CONFIG")
length=$(sed -n 's/^train_length = \([0-9]*\).*/\1/p' "$CONFIG")
deep=--n_layer=$((layers * 4 / 3))  # one more for three: as many parameters as meta-attention
if [ "$name" = study ]; then
    short="--phase_steps=1200 --val_interval=100 --eval_lengths=192,256,384,512"
    long=${short/1200/3600}         # where the marks do not tell which text is asked for
fi

prepare() {  # settings...
    python prepare.py "$CONFIG" --seed=1 "$@" $SETTINGS
}

pretrain() {  # model seed settings...
    local out=$OUT/$1_s$2 resume=
    if [ -f "$out.done" ]; then return; fi
    if [ -f "$out/ckpt.pt" ]; then resume=--init_from=resume; fi
    python train.py "$CONFIG" --out_dir="$out" --seed="$2" $SETTINGS "${@:3}" $resume &&
        touch "$out.done"
}

tune() {  # label model seed task placement marker settings...
    python eval_synthetic.py "$CONFIG" --label="$1" --init_from="$OUT/$2_s$3" --seed="$3" \
        --task="$4" --placement="$5" --marker="$6" --out_dir="$OUT" --workers=1 "${@:7}" $SETTINGS
}
export -f prepare pretrain tune
run() {  # the jobs of standard input, one a line, each with a log of its own
    if [ -n "$LIST" ]; then cat; return; fi
    mkdir -p "$OUT"
    xargs -d '\n' -P "${JOBS:-2}" -I{} bash -c 'log="$OUT/${0//[^[:alnum:]=.-]/_}.log"; echo "$0"
        eval "$0" >> "$log" 2>&1 || { echo "failed: $log"; exit 255; }' {}
}

collect() {  # part files...: their results, one a line
    python -c 'import json, sys
for path in sys.argv[2:]: print(json.dumps({"part": sys.argv[1]} | json.load(open(path))))' "$@"
}

models() {  # seed
    echo "pretrain gpt2 $1 $plain"
    echo "pretrain meta $1"
    echo "pretrain pause $1 --meta_attention=False"
    echo "pretrain deep $1 $plain $deep"
}

compare() {  # seed task placement settings...
    echo "tune 'B GPT-2, #' gpt2 $1 $2 $3 text ${*:4}"
    echo "tune 'B GPT-2, fresh token' gpt2 $1 $2 $3 fresh ${*:4}"
    echo "tune 'C pause' pause $1 $2 $3 meta ${*:4}"
    echo "tune 'D meta' meta $1 $2 $3 meta ${*:4}"
    echo "tune 'E GPT-2, meta added' gpt2 $1 $2 $3 meta --add_meta ${*:4}"
    echo "tune 'F deeper GPT-2, fresh token' deep $1 $2 $3 fresh $deep ${*:4}"
}

beyond() {  # seed label settings...: tune on up to 512, measure up to 1,280
    local far="--block_size=1024 --train_length=512 --eval_lengths=256,512,768,1024,1280"
    echo "tune '$2, B GPT-2, #' gpt2 $1 copying task text $far ${*:3}"
    echo "tune '$2, D meta' meta $1 copying task meta $far ${*:3}"
}

runs() {  # seed
    echo "tune 'A GPT-2' gpt2 $1 copying none none $short"
    compare "$1" copying task $short
    compare "$1" copying all $long
    echo "tune 'A GPT-2' gpt2 $1 list_recall none none"
    compare "$1" list_recall task
    if [ "$name" = study ]; then
        echo "tune 'A GPT-2, 3,600 steps' gpt2 $1 copying none none $long"
        beyond "$1" "no YaRN"
        beyond "$1" "YaRN" --yarn_scale=4
    fi
}

printf '%s\n' prepare "prepare $plain" | run
for seed in $seeds; do models "$seed"; done | run
for seed in $seeds; do runs "$seed"; done | run
[ -z "$LIST" ] || exit 0

{
    grep -vE '^\{"part": "(main|beyond)"' "results/$name.jsonl" || true  # what others made
    collect main results/[A-F]_*_{copying,list_recall}_*_"${length}"_s*.json
    if [ "$name" = study ]; then collect beyond results/{YaRN,no_YaRN}_*.json; fi
} > "results/$name.jsonl.new"
mv "results/$name.jsonl.new" "results/$name.jsonl"
tail -n 1 "$OUT"/*_s?/log.jsonl > "results/${name}_pretraining.txt"
plot="python results/plot_synthetic.py results/$name.jsonl"
$plot --show=seeds --out="results/$name.png"
if [ "$name" = study ]; then $plot --part=beyond --show=length --out=results/study_beyond.png; fi
