#!/usr/bin/env bash
# The study of README's "Results": pre-trains four models a seed, tunes each with every mark, measures, draws the figure.
#
#     results/study.sh                                      # hours of two cores; SEEDS="1 2" and JOBS=4 change how many
#     results/study.sh config/study_gpu.py --source=FOLDER  # larger models, on a GPU; settings behind the config go to every command
#
# What is there already is not done again, and what was interrupted goes on where it was.
set -e
export CONFIG=${1:-config/study.py} SETTINGS=${*:2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
name=$(basename "$CONFIG" .py)
export OUT=out/$name
mkdir -p "$OUT"
layers=$(sed -n 's/^n_layer = //p' "$CONFIG")
plain="--dataset=${name}_plain --meta_rate=0 --meta_attention=False"

pretrain() {  # model seed settings...: the model $OUT/<model>_s<seed>
    local out=$OUT/$1_s$2 resume=
    [ -f "$out.done" ] && return
    [ -f "$out/ckpt.pt" ] && resume=--init_from=resume
    python train.py "$CONFIG" --out_dir="$out" --seed="$2" "${@:3}" $SETTINGS $resume >> "$out.log" 2>&1 && touch "$out.done"
}

tune() {  # model seed task placement marker label settings...: results/<label>_<task>_<placement>_....json
    python eval_synthetic.py "$CONFIG" --init_from="$OUT/$1_s$2" --out_dir="$OUT" --seed="$2" --task="$3" --placement="$4" \
        --marker="$5" --label="$6" --workers=1 "${@:7}" $SETTINGS >> "$OUT/${6%% *}_$3_$4_$5_s$2.log" 2>&1
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

python prepare.py "$CONFIG" --seed=1 $SETTINGS
python prepare.py "$CONFIG" --seed=1 $plain $SETTINGS
models | together

copying=
if [ "$name" = study ]; then  # the shortest prompts of Copying are of 139 bytes: one phase
    copying="--phase_steps=1200 --val_interval=100 --eval_lengths=192,256,384,512"
fi
{
    lines copying task $copying
    lines list_recall task
    lines copying all $copying
    lines list_recall all
} | together
python eval_synthetic.py --plot results/?_*.json
mkdir -p "results/$name"
cp results/?_*.json results/synthetic.png "results/$name/"
