#!/usr/bin/env bash
# The study of README's "Results": pre-trains four models a seed, tunes each with every mark, measures, draws the figure.
#
#     results/study.sh                                      # a day of two cores; SEEDS="1 2": these alone; JOBS=4: so many at a time
#     results/study.sh config/study_gpu.py --source=FOLDER  # larger models, on a GPU; settings behind the config go to every command
#
# WORKERS=4 has four processes draw examples for each job, which a GPU with GPT-2's BPE needs.
# What is there already is not done again, and what was interrupted goes on where it was.
set -e
export CONFIG=${1:-config/study.py} SETTINGS=${*:2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
name=$(basename "$CONFIG" .py)
export OUT=out/$name
mkdir -p "$OUT"
layers=$(sed -n 's/^n_layer = //p' "$CONFIG")
length=$(sed -n 's/^train_length = \([0-9]*\).*/\1/p' "$CONFIG")
plain="--dataset=${name}_plain --meta_rate=0 --meta_attention=False"

pretrain() {  # model seed settings...: the model $OUT/<model>_s<seed>
    local out=$OUT/$1_s$2 resume=
    [ -f "$out.done" ] && return
    [ -f "$out/ckpt.pt" ] && resume=--init_from=resume
    python train.py "$CONFIG" --out_dir="$out" --seed="$2" $SETTINGS "${@:3}" $resume >> "$out.log" 2>&1 && touch "$out.done"
}

tune() {  # model seed task placement marker label settings...: results/<label>_<task>_<placement>_....json
    python eval_synthetic.py "$CONFIG" --init_from="$OUT/$1_s$2" --out_dir="$OUT" --seed="$2" --task="$3" --placement="$4" \
        --marker="$5" --label="$6" --workers="${WORKERS:-1}" "${@:7}" $SETTINGS >> "$OUT/${6//[^[:alnum:].-]/_}_$3_$4_$5_s$2.log" 2>&1
}
export -f pretrain tune

together() {  # the commands of standard input, JOBS of them at a time
    xargs -d '\n' -P "${JOBS:-2}" -I{} bash -c 'echo "$0"; eval "$0" || { echo "failed: $0"; exit 255; }' {}
}

models() {  # the commands that pre-train; deep has as many parameters more as meta-attention has
    for seed in ${SEEDS:-1 2 3}; do
        echo "pretrain gpt2 $seed $plain"
        echo "pretrain meta $seed"
        echo "pretrain pause $seed --meta_attention=False"
        echo "pretrain deep $seed $plain --n_layer=$((layers * 4 / 3))"
    done
}

lines() {  # task placement settings...: the commands that tune and measure, one for each line of the table
    local task=$1 placement=$2 settings=${*:3}
    for seed in ${SEEDS:-1 2 3}; do
        [ "$placement" = task ] && echo "tune gpt2 $seed $task none none 'A GPT-2' $settings"
        echo "tune gpt2 $seed $task $placement text 'B GPT-2, #' $settings"
        echo "tune gpt2 $seed $task $placement fresh 'B GPT-2, fresh token' $settings"
        echo "tune pause $seed $task $placement meta 'C pause' $settings"
        echo "tune meta $seed $task $placement meta 'D meta' $settings"
        echo "tune gpt2 $seed $task $placement meta 'E GPT-2, meta added' --add_meta $settings"
        echo "tune deep $seed $task $placement fresh 'F deeper GPT-2, fresh token' $settings"
    done
}

rates() {  # task placement settings...: the same at other learning rates, of the first seed: how much hangs on the rate
    local seeds=${SEEDS:-1}
    for rate in 1e-3 4e-3; do
        SEEDS=${seeds%% *} lines "$@" | sed "s/'\(.*\)'/'rate $rate, \1'/; s/\$/ --task_lr=$rate/"
    done
}

python prepare.py "$CONFIG" --seed=1 $SETTINGS
python prepare.py "$CONFIG" --seed=1 $plain $SETTINGS
models | together

copying= everywhere=
if [ "$name" = study ]; then  # the shortest prompts of Copying are of 139 bytes: one phase
    copying="--phase_steps=1200 --val_interval=100 --eval_lengths=192,256,384,512"
    everywhere="--phase_steps=3600"  # three times as many where the mark does not say which text is asked for
fi
{
    lines copying task $copying
    lines copying all $copying $everywhere
    lines list_recall task
    lines list_recall all
    if [ "$name" = study ]; then
        for seed in ${SEEDS:-1 2 3}; do
            echo "tune gpt2 $seed copying none none 'A GPT-2, 3,600 steps' $copying $everywhere"
            echo "tune meta $seed copying all meta 'D meta at 4e-3' $copying $everywhere --task_lr=4e-3"
        done
        rates copying task $copying
    fi
} | together
python eval_synthetic.py --plot results/?_*_"${length}"_s*.json
mkdir -p "results/$name/rates"
cp results/?_*_"${length}"_s*.json results/synthetic.png "results/$name/"
[ "$name" = study ] && cp results/rate_*.json "results/$name/rates/"
tail -n 1 "$OUT"/*_s?/log.jsonl > "results/$name/pretraining.txt"
