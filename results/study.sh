#!/usr/bin/env bash
# The study of README's "Results": pre-trains four models a seed, tunes each with every mark, measures, draws the figure.
#
#     results/study.sh                    # hours of two cores; SEEDS="1 2" and JOBS=4 change how many
#
# What is there already is not done again, and what was interrupted goes on where it was.
set -e
export CONFIG=${1:-config/study.py} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OUT=out/$(basename "$CONFIG" .py)
mkdir -p "$OUT"

pretrain() {  # model seed settings...: the model $OUT/<model>_s<seed>
    local out=$OUT/$1_s$2 resume=
    [ -f "$out.done" ] && return
    [ -f "$out/ckpt.pt" ] && resume=--init_from=resume
    python train.py "$CONFIG" --out_dir="$out" --seed="$2" "${@:3}" $resume >> "$out.log" 2>&1 && touch "$out.done"
}

tune() {  # model seed task placement marker label settings...: results/<label>_<task>_<placement>_....json
    python eval_synthetic.py "$CONFIG" --init_from="$OUT/$1_s$2" --out_dir="$OUT" --seed="$2" --task="$3" --placement="$4" \
        --marker="$5" --label="$6" --workers=1 "${@:7}" >> "$OUT/${6%% *}_$3_$4_$5_s$2.log" 2>&1
}
export -f pretrain tune

together() {  # the commands of standard input, JOBS of them at a time
    xargs -d '\n' -P "${JOBS:-2}" -I{} bash -c 'echo "$0"; eval "$0" || { echo "failed: $0"; exit 255; }' {}
}

plain="--dataset=study_plain --meta_rate=0 --meta_attention=False"
python prepare.py "$CONFIG"
python prepare.py "$CONFIG" $plain

for seed in ${SEEDS:-1 2 3}; do
    echo "pretrain gpt2 $seed $plain"
    echo "pretrain meta $seed"
    echo "pretrain pause $seed --meta_attention=False"
    echo "pretrain deep $seed $plain --n_layer=4"
done | together

for placement in task all; do
    for seed in ${SEEDS:-1 2 3}; do
        echo "tune gpt2 $seed list_recall $placement text 'B GPT-2, #'"
        echo "tune meta $seed list_recall $placement meta 'D meta'"
        echo "tune gpt2 $seed list_recall $placement fresh 'B GPT-2, fresh token'"
        echo "tune pause $seed list_recall $placement meta 'C pause'"
        [ $placement = task ] && echo "tune gpt2 $seed list_recall none none 'A GPT-2'"
        echo "tune gpt2 $seed list_recall $placement meta 'E GPT-2, meta added' --add_meta"
        echo "tune deep $seed list_recall $placement fresh 'F GPT-2 of 4 layers, fresh token'"
    done
done | together
python eval_synthetic.py --plot results/?_*.json
mkdir -p results/study
cp results/?_*.json results/synthetic.png results/study/
