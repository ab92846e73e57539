#!/bin/bash
# Trains on one GPU as a Hugging Face job. In a checkout, after `hf auth login`, with a bucket (hf buckets create) that has the
# data in data/ and gets the work directory in runs/:
#
#   BUCKET=me/spt deploy/huggingface_job.sh            # or with DRY_RUN=--dry-run, which only prints the job
#
# The checkout is copied to the job; a further attempt resumes from the last checkpoint.
set -eu

hf jobs run --flavor l4x1 --timeout 6h --attempts 3 --secrets HF_TOKEN \
    --env BASE="${BASE:-Qwen/Qwen3-0.6B}" --env RUN=/bucket/runs/trec --env DATA=/bucket/data \
    --volume .:/source:ro --volume "hf://buckets/$BUCKET:/bucket:rw" ${DRY_RUN:-} \
    python:3.12 bash -c '
  cp -r /source /tmp/source && pip install -q -c /source/requirements.txt "/tmp/source[cuda13,plots]" && spt-jax env
  RESUME=$(test -e $RUN/config.json && echo --resume || true)
  exec spt-jax train local_files --workdir $RUN --base.path $BASE \
    --data.train $DATA/train.jsonl --data.validation $DATA/validation.jsonl --data.test $DATA/test.jsonl \
    --data.prompt "<soft>{text}\n" --data.target "{label}" --train.steps 2000 $RESUME
'
