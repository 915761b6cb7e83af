#!/bin/bash
# Start a Ray cluster on the nodes of one Slurm job, and one run on it:
#   sbatch deploy/slurm.sh SHARDS... --out RUN --model resnet50 --method grad-cam
# Submit it from a folder that all nodes see, with `ray` and `saltern` on the PATH. A preempted job is queued again
# and continues from its receipts. After a time limit, submit the same sbatch line again.
#SBATCH --job-name=saltern
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=saltern-%j.log
set -euo pipefail

# A token for this job. Only its user can read it.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.saltern-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export RAY_prestart_worker_first_driver=0 # a process for each core, which no worker of the run would use
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
address="$head:$port"
# Drivers get no lines of workers, so that nobody needs a process that reads their logs.
ray_start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --include-log-monitor=false)

# The steps end with this script. Never `ray stop`: it ends every Ray process of the user.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "${ray_start[@]}" --head --port=$port --include-dashboard=false --temp-dir="/tmp/saltern-$SLURM_JOB_ID" &

for ((tries = 0; tries < 240; tries++)); do
    (exec 3<> "/dev/tcp/$head/$port") 2> /dev/null && break
    sleep 0.5
done
((tries < 240)) || { echo "the Ray head on $head did not start" >&2; exit 1; }

workers=$((SLURM_JOB_NUM_NODES - 1))
if ((workers > 0)); then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head" --kill-on-bad-exit=0 \
        "${ray_start[@]}" --address="$address" &
fi

# The run asks for all workers, and starts with the first that is ready.
count=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))
saltern extract "$@" --engine ray --address "$address" --workers "$count"
