# The body of every batch script: start one task per GPU (or core), pass SLURM's notice on, requeue.
# Expects: stage, templates, and perhaps srun_options. "$@" is the configuration file and its overrides.
#
# SLURM does not requeue on exit codes, so this script does, and tells the reasons apart (slurm/README.md). What it
# finds goes to this log and, by `dist-train job`, to the stage's folder, where `dist-train status` reads it.

source "${DIST_TRAIN_ENV:-$templates/env.sh}"

# sbatch sets one of them. Where it was called inside of another job, that one's stands beside it, and srun refuses both.
# Without them a step has all of its job's memory.
unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE

# An element of an array goes by its own name: the bare id of the array's last element stands for the whole array.
job=$SLURM_JOB_ID
[[ -n ${SLURM_ARRAY_JOB_ID:-} ]] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}

say() { echo "[$(date '+%F %T')] job $job, start $((restarts + 1)): $*"; }
field() { sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" <<<"$record" | head -n 1; }
look() { # a controller that has just lost a node may not answer at once
    local try
    for try in 1 2 3; do
        record=$(scontrol show job "$job" 2>/dev/null) && return
        sleep 1
    done
}
seconds_left() {
    local end=$(field EndTime)
    end=$(date -d "${end:-unknown}" +%s 2>/dev/null) || end=$(($(date +%s) + 10 ** 9)) # no limit
    echo $((end - $(date +%s)))
}
node_lost() { # it may be back already; what SLURM wrote into this log stays
    [[ -n $(sinfo --noheader --dead --nodes="$SLURM_JOB_NODELIST" --format=%N 2>/dev/null) ]] ||
        sed "1,/^\[[^]]*\] job [^ ]*, start $((restarts + 1)): started/d" "$log" 2>/dev/null |
        grep -qE "^(srun|slurmstepd(-[^:]*)?): error: (\*\*\* .* DUE TO NODE FAILURE|Node failure on )"
}

# How a command runs beside the ranks, on this node, and how the ranks' own command begins: see env.sh.
here=() inside=()
case ${container:-} in
*.sqsh | docker://*) # Enroot, through srun's plugin Pyxis
    srun_options+=(--container-image="$container" --container-mounts="$container_mounts" --container-workdir="$PWD")
    here=(srun --overlap --export=ALL --nodes=1 --ntasks=1 --gpus=0 --mpi=none "${srun_options[@]: -3}")
    ;;
?*) # Apptainer
    inside=(apptainer exec --nv --bind "$container_mounts" --pwd "$PWD" "$container")
    here=("${inside[@]}")
    ;;
esac
python=("${DIST_TRAIN_PYTHON:-python}" -m dist_train)

# USR1 comes from SLURM before the time limit (--signal in the template), to this shell alone: `B:`.
# Forwarded to srun by PID, it reaches all tasks; training saves a checkpoint and ends with 0.
notice= interrupted= step= record=
on_notice() {
    interrupted=1
    look
    notice=signal
    # SLURM looks every half minute, and rounds towards early.
    (($(seconds_left) <= ${DIST_TRAIN_NOTICE:-600} + 45)) && notice="time limit"
    [[ -n $(field PreemptTime) && $(field PreemptTime) != None ]] && notice=preemption
    say "notice received ($notice); $stage saves and ends"
    [[ -n $step ]] && kill -USR1 "$step" 2>/dev/null
}
# SLURM sends TERM to all of a job when it ends it, to the ranks too. srun would pass TERM on as KILL: they may save.
on_end() { interrupted=1 && say "SLURM ends this job"; }
trap on_notice USR1
trap on_end TERM

# Why the step ended, in `reason`: nothing if for no reason of SLURM's. `over`: SLURM itself ends or requeues this job.
find_reason() {
    look
    local preempted=
    [[ -n $(field PreemptTime) && $(field PreemptTime) != None ]] && preempted=1
    if [[ ! $record ]]; then # SLURM does not say: only its own words in the log are left
        if node_lost; then over=1 reason="node failure"; else reason=$notice; fi
    elif (($(field Restarts) > restarts)); then # SLURM has requeued it by itself
        over=1
        if node_lost; then reason="node failure"; elif [[ $preempted ]]; then reason=preemption; else reason=requeued; fi
    elif [[ $(field JobState) != RUNNING ]]; then
        over=1
        (($(date +%s) >= limit)) && reason="killed at the time limit" || reason=cancelled
    elif [[ $preempted ]]; then # ranks were told with TERM
        reason=preemption
    elif [[ $notice ]]; then
        reason=$notice
    elif ((code)) && node_lost; then
        reason="node failure"
    fi
}

look
limit=$(($(date +%s) + $(seconds_left)))
log=$(sed -n "s/^ *StdErr=//p" <<<"$record" | head -n 1) # may have blanks
say "$stage on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} tasks"
last=
((restarts)) && last=$(sacct --noheader --parsable2 --allocations --duplicates --jobs="$job" --format=State 2>/dev/null |
    tail -n 2 | head -n 1)
told=$("${here[@]}" "${python[@]}" job begin --last-state "${last%% *}" "$stage" "$@")
code=$?
[[ $told ]] && say "$told"
((code == 3)) && exit 1

# srun does not take --cpus-per-task from sbatch (since Slurm 22.05), but does take its --export=NONE, with which no rank
# would know of env.sh. A dead rank must not leave the rest waiting.
srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" \
    "${inside[@]}" "${python[@]}" "$stage" "$@" &
step=$!
[[ $notice ]] && kill -USR1 "$step" 2>/dev/null

# A trap interrupts `wait`; srun's own exit code comes from the wait that no trap interrupts.
while :; do
    interrupted=
    wait "$step"
    code=$?
    [[ $interrupted ]] || break
done

reason= over=
find_reason
told=$("${here[@]}" "${python[@]}" job end --code "$code" --reason "$reason" --log "$log" "$stage" "$@")
verdict=$?
say "${told:-$stage ended with $code${reason:+ ($reason)}}"
[[ $over ]] && exit "$code"
case $verdict in
0) exit "$code" ;;
3) exit 1 ;;
esac
# 75: go on. Anything else: Python itself did not answer; after a notice that is no reason to lose the run.
if ((verdict == 75)) || [[ -n $notice ]]; then
    scontrol requeue "$job"
    exit 0
fi
exit "$code"
