#!/usr/bin/env bash
# The study of README's "Results": pre-trains four models a seed, tunes each with every mark, measures, draws the figure.
#
#     results/study.sh                                      # days of two cores; SEEDS="1 2": these alone; JOBS=4: so many at a time
#     results/study.sh config/study_gpu.py --source=FOLDER  # larger models, on a GPU; settings behind the config go to every command
#
# WORKERS=4 has four processes draw examples for each job, which a GPU with GPT-2's BPE needs; LIST=1 only lists the commands.
# What is there already is not done again, and what was interrupted goes on where it was.
set -e
export CONFIG=${1:-config/study.py} SETTINGS=${*:2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
name=$(basename "$CONFIG" .py)
seeds=${SEEDS:-1 2 3}
first=${seeds%% *}
export OUT=out/$name
mkdir -p "$OUT"
layers=$(sed -n 's/^n_layer = //p' "$CONFIG")
length=$(sed -n 's/^train_length = \([0-9]*\).*/\1/p' "$CONFIG")
plain="--dataset=${name}_plain --meta_rate=0 --meta_attention=False"

data() {  # settings...: prepares a dataset
    python prepare.py "$CONFIG" --seed=1 "$@" $SETTINGS
}

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
export -f data pretrain tune

together() {  # the commands of standard input, JOBS of them at a time
    [ -n "$LIST" ] && cat && return
    xargs -d '\n' -P "${JOBS:-2}" -I{} bash -c 'echo "$0"; eval "$0" || { echo "failed: $0"; exit 255; }' {}
}

models() {  # the commands that pre-train; deep has as many parameters more as meta-attention has
    for seed in $seeds; do
        echo "pretrain gpt2 $seed $plain"
        echo "pretrain meta $seed"
        echo "pretrain pause $seed --meta_attention=False"
        echo "pretrain deep $seed $plain --n_layer=$((layers * 4 / 3))"
    done
}

lines() {  # task placement settings...: the commands that tune and measure, one for each line of the table
    local task=$1 placement=$2 settings=${*:3}
    for seed in $seeds; do
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
    for rate in 1e-3 4e-3; do
        seeds=$first lines "$@" | sed "s/'\(.*\)'/'rate $rate, \1'/; s/\$/ --task_lr=$rate/"
    done
}

more_models() {  # D with F's four layers; of the first seed: four times as many steps, learned positions, meta-tokens at other rates and places
    for seed in $seeds; do
        echo "pretrain deepmeta $seed --n_layer=$((layers * 4 / 3))"
    done
    echo "pretrain gpt2long $first $plain --max_iters=12000"
    echo "pretrain long $first --max_iters=12000"
    echo "pretrain ape $first --pos=absolute"
    echo "pretrain gpt2ape $first $plain --pos=absolute"
    echo "data --dataset=study_k05 --meta_rate=0.05 && pretrain k05 $first --dataset=study_k05 --meta_rate=0.05"
    echo "data --dataset=study_k20 --meta_rate=0.2 && pretrain k20 $first --dataset=study_k20 --meta_rate=0.2"
    echo "data --dataset=study_periodic --meta_placement=periodic && pretrain periodic $first --dataset=study_periodic --meta_placement=periodic"
}

beyond() {  # tuned on up to 512 tokens, and measured far beyond: as trained, and with YaRN
    local settings="--block_size=1024 --train_length=512 --phase_steps=1000 --val_interval=200 --eval_lengths=256,512,768,1024,1280 --rows=full" variant
    for variant in "no YaRN=1" "YaRN=4"; do
        lines copying task $settings | sed "/ meta '/s/\$/,no_pos/; s/'\(.*\)'/'${variant%=*}, \1'/; s/\$/ --yarn_scale=${variant#*=}/"
    done
}

variants() {  # settings of Copying...: these, tuned
    for seed in $seeds; do
        echo "tune deepmeta $seed copying all meta 'four layers, D meta' $* $everywhere"
        echo "tune deep $seed copying all meta 'four layers, E GPT-2, meta added' $* $everywhere --add_meta"
    done
    echo "tune gpt2long $first copying task text 'long, B GPT-2, #' $*"
    echo "tune long $first copying task meta 'long, D meta' $*"
    echo "tune gpt2long $first copying none none 'long, A GPT-2' $* $everywhere"
    echo "tune gpt2long $first copying all text 'long, B GPT-2, #' $* $everywhere"
    echo "tune gpt2long $first copying all fresh 'long, B GPT-2, fresh token' $* $everywhere"
    echo "tune long $first copying all meta 'long, D meta' $* $everywhere"
    echo "tune ape $first copying task meta 'learned positions, D meta' $*"
    echo "tune gpt2ape $first copying task text 'learned positions, B GPT-2, #' $*"
    for model in k05 k20 periodic; do
        echo "tune $model $first copying task meta '$model, D meta' $*"
    done
}

[ -n "$LIST" ] || { data; data $plain; }
{ models; [ "$name" != study ] || more_models; } | together

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
        lines segment_counting task $copying
        lines parity task
        for seed in $seeds; do
            echo "tune gpt2 $seed copying none none 'A GPT-2, 3,600 steps' $copying $everywhere"
            echo "tune meta $seed copying all meta 'D meta at 4e-3' $copying $everywhere --task_lr=4e-3"
            [ "$seed" = "$first" ] || echo "tune meta $seed copying task meta 'rate 4e-3, D meta' $copying --task_lr=4e-3"
        done
        rates copying task $copying
        beyond
        variants $copying
    fi
} | together
[ -n "$LIST" ] && exit
shown=(results/?_*_{copying,list_recall}_*_"${length}"_s*.json)
mkdir -p "results/$name"
if [ "$name" = study ]; then
    mkdir -p results/study/{rates,beyond,variants}
    python eval_synthetic.py --plot results/{YaRN,no_YaRN}_*.json
    cp results/synthetic.png results/study/beyond.png
    cp results/rate_*.json results/study/rates/
    cp results/{YaRN,no_YaRN}_*.json results/study/beyond/
    cp results/{?_*_segment_counting,?_*_parity,long,learned,four,k05,k20,periodic}*.json results/study/variants/
fi
python eval_synthetic.py --plot "${shown[@]}"
cp "${shown[@]}" results/synthetic.png "results/$name/"
tail -n 1 "$OUT"/*_s?/log.jsonl > "results/$name/pretraining.txt"
