#!/usr/bin/env bash
# The paper's figure 1, and the control that explains it, in ten minutes of one GPU:
# pre-trains four models, tunes them on List Recall and draws results/synthetic.png.
#     SOURCE=novels results/gpu_study.sh    # a folder of text files, or a Hugging Face name
#     SEED=2 results/gpu_study.sh           # another seed
#     SMALL=1 results/gpu_study.sh          # tiny models on a CPU: a rehearsal of 3 minutes
#
# Interrupted, it goes on where it was. Settings behind the name go to every command;
# ONLY="prepare|pretrain|C pause" runs only the commands that match.
set -e
cd "$(dirname "$0")/.."
data=novels length=512 steps=500 deep=--n_layer=8 settings=--source=${SOURCE:-novels}
if [ -n "$SMALL" ]; then
    data=small length=128 steps=25 deep=--n_layer=4
    settings="--source=stdlib --tokenizer=bytes --max_tokens=1000000 --block_size=128
        --n_layer=3 --n_head=4 --n_embd=64 --batch_size=16 --max_iters=200 --eval_tokens=20000
        --train_length=128 --eval_lengths=128,192 --test_examples=100"
fi
export CONFIG="config/study_gpu.py $settings" SETTINGS=$* SEED=${SEED:-1} OMP_NUM_THREADS=1
export OUT=out/${data}_s$SEED && mkdir -p "$OUT"
meta=--dataset=${data}_meta plain="--dataset=${data}_plain --meta_rate=0 --meta_attention=False"

pretrain() {  # model, its settings...
    [ ! -f "$OUT/$1.done" ] || return 0
    [ ! -f "$OUT/$1/ckpt.pt" ] || set -- "$@" --init_from=resume
    python train.py $CONFIG --seed="$SEED" --out_dir="$OUT/$1" "${@:2}" $SETTINGS \
        &>> "$OUT/$1.log" && touch "$OUT/$1.done"
}
tune() {  # model, placement, marker, label, its settings...
    python eval_synthetic.py $CONFIG --seed="$SEED" --init_from="$OUT/$1" --out_dir="$OUT" \
        --placement="$2" --marker="$3" --label="$4" --workers=4 "${@:5}" $SETTINGS \
        &>> "$OUT/$4, $2.log"
}
export -f pretrain tune
together() {  # stage, number: runs the commands of standard input, so many at a time
    grep -E "${ONLY:-.}" |
        xargs -d '\n' -P "$2" -I{} bash -c 'eval "$0" || { echo "failed: $0"; exit 255; }' {}
    echo "$1: $((SECONDS - began)) s" && began=$SECONDS
}

printf 'python prepare.py $CONFIG %s $SETTINGS\n' "$meta" "$plain" | together preparing 1
together pre-training 2 <<< "pretrain gpt2 $plain
pretrain meta $meta
pretrain pause $meta --meta_attention=False
pretrain deep $plain $deep"
five="A GPT-2|B GPT-2, #|C pause|D meta|F deeper GPT-2, fresh token"
task="--phase_steps=$steps" all="--phase_steps=$((2 * steps))"  # no mark tells there
together tuning 4 <<< "tune pause task meta 'C pause' $task
tune deep task fresh 'F deeper GPT-2, fresh token' $deep $task
tune meta task meta 'D meta' $task
tune gpt2 task text 'B GPT-2, #' $task
tune gpt2 task fresh 'B GPT-2, fresh token' $task
tune gpt2 none none 'A GPT-2' $task
tune gpt2 task meta 'E GPT-2, meta added' --add_meta $task
tune gpt2 all fresh 'B GPT-2, fresh token' $all
tune meta all meta 'D meta' $all
tune gpt2 all meta 'E GPT-2, meta added' --add_meta $all
tune deep all fresh 'F deeper GPT-2, fresh token' $deep $all"
echo "python results/plot_synthetic.py results/?_*_list_recall_*_${length}_s${SEED}_$SEED.json \
    --show=length --panel='task: $five'" | together drawing 1
