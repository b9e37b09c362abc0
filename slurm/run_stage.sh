# The body of every batch script: start one task per GPU (or core), pass SLURM's notice on, requeue.
# Expects: stage, templates, and perhaps srun_options. "$@" is the configuration file and its overrides.

source "${DIST_TRAIN_ENV:-$templates/env.sh}"

say() { echo "[$(date '+%F %T')] job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# USR1 comes from SLURM before the time limit (--signal in the template), to this shell alone: `B:`.
# Forwarded to srun by PID, it reaches all tasks; training saves a checkpoint and ends with 0.
notice=
on_notice() {
    notice=1
    say "notice received; $stage saves and ends"
    kill -USR1 "$step" 2>/dev/null
}
trap on_notice USR1
trap 'say "ended from outside"; kill -TERM "$step" 2>/dev/null' TERM

say "$stage on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} tasks"
# srun does not take --cpus-per-task from sbatch (since Slurm 22.05), and a dead rank must not leave the rest waiting.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${srun_options[@]}" \
    "${DIST_TRAIN_PYTHON:-python}" -m dist_train "$stage" "$@" &
step=$!

# A trap interrupts `wait`; srun's own exit code comes from the wait that no trap interrupts.
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

# SLURM does not requeue on exit codes, so the script does: only after a notice, and only if the stage ended because of
# it, by itself (0) or, before it could listen, by the signal (above 128). Every stage goes on from what it committed.
if [[ -n $notice ]] && ((code == 0 || code > 128)); then
    if ((${SLURM_RESTART_COUNT:-0} < ${DIST_TRAIN_MAX_REQUEUES:-200})); then
        say "$stage ended with $code after the notice; requeued"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    say "$stage was requeued ${SLURM_RESTART_COUNT:-0} times (DIST_TRAIN_MAX_REQUEUES); submit it again to go on"
    exit 1
fi
say "$stage ended with $code"
exit "$code"
