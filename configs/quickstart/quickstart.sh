#!/bin/sh
# The main job, end to end, as the commands that you would type yourself; each is shown before it runs.
# Run from the repository's root with the virtual environment first in PATH (`make quickstart` does that).
# What is done already is not done again: after an interruption, start it once more.
# SEED=2 sh configs/quickstart/quickstart.sh   the same with another seed, in runs/quickstart-seed2
set -eu
SEED="${SEED:-1}"
export DS_ACCELERATOR=cpu # two processes share what every machine has; without this line deepspeed looks for GPUs
TEXT=runs/quickstart/text DATA=runs/quickstart/data
[ "$SEED" = 1 ] && RUNS=runs/quickstart || RUNS="runs/quickstart-seed$SEED"

show() { printf '\n$ %s\n' "$*"; "$@"; }
say() { printf '\n== %s ==\n' "$*"; }
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# pip gives the deepspeed script a first line that breaks where the environment's path has a space.
DEEPSPEED_SCRIPT="$(command -v deepspeed)"
deepspeed() { python "$DEEPSPEED_SCRIPT" "$@"; }
# --num_accelerators: how many processes; deepspeed would start one for each GPU, and one on a machine without.
train() {
    config="$1"; shift
    show deepspeed --num_accelerators 2 --master_port "$(free_port)" launcher/run.py "configs/quickstart/$config.yaml" \
        "seed=$SEED" "output=$RUNS/$config" "$@"
}

say "1 of 5: text from this Python's own standard library, a tokenizer, and two corpora, each with a held-out part"
show python configs/quickstart/standard_library_text.py "$TEXT"
[ -e "$DATA/tokenizer" ] || show cpt data tokenizer "$TEXT/prose.jsonl" "$TEXT/code.jsonl" --output "$DATA/tokenizer" --vocab-size 2048
[ -e "$DATA/prose" ] || show cpt data build "$TEXT/prose.jsonl" --tokenizer "$DATA/tokenizer" --output "$DATA/prose" --holdout 5% --workers 2
[ -e "$DATA/code" ] || show cpt data build "$TEXT/code.jsonl" --tokenizer "$DATA/tokenizer" --output "$DATA/code" --holdout 5% --workers 2

say "2 of 5: a base model learns prose"
train base

say "3 of 5: two children learn code: one plainly, one with replay and a re-warmed learning rate"
train plain "parent.run=$RUNS/base"
train replay "parent.run=$RUNS/base"

say "4 of 5: the child with replay becomes a Hugging Face model"
[ -e "$RUNS/model" ] || show cpt convert to-hf "$RUNS/replay" "$RUNS/model" --dtype fp32
show python configs/quickstart/use_exported_model.py "$RUNS/model" "$RUNS/replay"

say "5 of 5: what was learned, and what was lost"
show cpt report "$RUNS/base" "$RUNS/plain" "$RUNS/replay" --output "$RUNS/report.html"
cat <<END

the model      $RUNS/model          for transformers.AutoModelForCausalLM; certificate.json proves that it is the trained one
the report     $RUNS/report.html    loss curves, learning rates and score matrices; open it in a browser
the runs       $RUNS/base, $RUNS/plain, $RUNS/replay

Next, with your own text (jsonl with a "text" field, parquet or txt):
  . .venv/bin/activate
  cpt data build YOUR_TEXT... --tokenizer $DATA/tokenizer --output data/mine --holdout 5%
  cpt train configs/quickstart/replay.yaml parent.run=$RUNS/base output=runs/mine stages.0.sources.code.corpus=data/mine
and from a model on the Hugging Face Hub, on GPUs or under SLURM: README.md.
END
