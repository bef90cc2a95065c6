"""The faults that a run has to survive, what is promised for each, and the tests that inject it: those of the suite, and some that take
too long for it (``extra.py``, ``jobs.py``) or need more of the system (``file_systems.py``, ``network.py``)."""

from __future__ import annotations

from dataclasses import dataclass

CLUSTER = "tests/slurm/test_on_a_cluster.py::"
STORMY = CLUSTER + "test_warned_killed_damaged_and_preempted_it_ends_equal"
ENDED = CLUSTER + "test_cancelled_stays_cancelled_and_a_loop_without_progress_ends"
SAVING = "tests/trainer/test_checkpoint_saving.py::"
DAMAGE = "tests/trainer/test_checkpoint_damage.py::"
KILL = "tests/trainer/test_checkpoint_kill.py::"
GUARDS = "tests/trainer/test_guards.py::"
METRICS = "tests/trainer/test_metrics.py::"
DOOR = "tests/test_front_door.py::"
SUBMIT = "tests/slurm/test_submit.py::"
EXTRA = "tests/faults/extra.py::"
JOBS = "tests/faults/jobs.py::"
EVERYTHING = JOBS + "test_everything_happens_to_one_run"
DISKS = "tests/faults/file_systems.py::"
NETWORK = "tests/faults/network.py::"
DATA = "tests/trainer/data/test_build.py::"
PREEMPTION = "tests/trainer/test_preemption.py::"


@dataclass(frozen=True)
class Row:
    """One fault."""

    number: int
    fault: str
    promised: str
    injected: str
    """By what means."""
    tests: tuple[str, ...]
    not_injected: str = ""
    """What of it is not, and why."""
    real: bool = True
    """Injected with the thing itself; False: something stands in for it, and ``not_injected`` says why."""


ROWS = (
    Row(1, "warning signal in mid-run", "saved at the step, requeued, resumed bit for bit", "real Slurm, USR1", (STORMY,)),
    Row(
        2,
        "time limit, crossed twice",
        "saved and requeued each time, bit for bit",
        "real Slurm, --time 1",
        (EXTRA + "test_a_time_limit_crossed_twice",),
    ),
    Row(
        3,
        "signal before Python is ready",
        "neither lost nor fatal",
        "real signals",
        (
            "tests/test_launcher.py::test_a_signal_before_ranks_can_take_it_is_neither_lost_nor_fatal",
            PREEMPTION + "test_the_poll_hook_stands_in_for_a_signal",
        ),
    ),
    Row(
        4,
        "warning signal several times",
        "one save, one requeue",
        "real signals",
        (PREEMPTION + "test_each_signal_sets_the_flag_and_repeats_change_nothing", PREEMPTION + "test_the_first_signal_wins"),
    ),
    Row(
        5,
        "preemption with a grace time",
        "saved, requeued by Slurm, bit for bit, never COMPLETED early",
        "real Slurm, two partitions",
        (STORMY,),
    ),
    Row(6, "scancel", "saved, CANCELLED, stays so", "real Slurm", (ENDED,)),
    Row(
        7,
        "kill -9 of one rank",
        "ends within seconds, resumes from the last save bit for bit",
        "SIGKILL",
        (DOOR + "test_a_killed_rank_fails_the_run_and_says_who", "tests/end_to_end/test_resume.py::test_killed_after_step_10"),
    ),
    Row(
        8,
        "kill -9 of all ranks in a save",
        "a loadable checkpoint at every moment, near the last step; resumed bit for bit",
        "SIGKILL at every file operation, and 50 times at random",
        (KILL + "test_killed_before_every_file_operation_of_a_save", EXTRA + "test_fifty_kills_at_random"),
    ),
    Row(
        9,
        "kill -9 while old checkpoints are deleted",
        "the newest two intact",
        "SIGKILL at every file operation",
        (KILL + "test_killed_before_every_file_operation_of_a_save", SAVING + "test_a_failed_deletion_costs_a_warning_not_the_run"),
    ),
    Row(
        10,
        "save over an existing step",
        "refused, the old one intact",
        "in process",
        (SAVING + "test_an_existing_step_is_never_overwritten",),
    ),
    Row(
        11,
        "one bit of the newest checkpoint flipped",
        "refused by file, the older one used",
        "flips on disk",
        (
            DAMAGE + "test_any_flipped_bit_is_refused_by_name_and_the_older_one_taken",
            SAVING + "test_what_does_not_read_back_is_set_aside_and_nothing_older_goes",
        ),
    ),
    Row(
        12,
        "shard truncated or missing, manifest missing",
        "passed over with the reason",
        "on disk",
        (DAMAGE + "test_missing_and_truncated_files_are_refused_by_name",),
    ),
    Row(
        13,
        "all checkpoints bad",
        "an error, never a start from zero",
        "on disk",
        (
            DAMAGE + "test_never_from_zero_when_all_are_bad",
            "tests/end_to_end/test_failures.py::test_all_checkpoints_damaged_is_an_error_and_not_a_fresh_start",
        ),
    ),
    Row(
        14,
        "pickle bomb in a checkpoint",
        "not executed",
        "real pickles",
        (
            DAMAGE + "test_a_pickle_bomb_with_a_consistent_manifest_does_not_go_off",
            DAMAGE + "test_a_bomb_in_place_of_a_tensor_does_not_go_off",
        ),
    ),
    Row(
        15,
        "disk full when saving",
        "older checkpoints kept, nothing partial, trains on where asked",
        "full tmpfs",
        (
            SAVING + "test_a_really_full_disk_keeps_the_previous_checkpoint",
            SAVING + "test_one_ranks_full_disk_fails_the_save_on_all_and_leaves_nothing",
            GUARDS + "test_a_disk_without_room_for_a_checkpoint",
        ),
    ),
    Row(
        16,
        "disk full under metrics and TensorBoard",
        "training goes on, one warning",
        "full tmpfs",
        (METRICS + "test_a_disk_that_is_really_full", METRICS + "test_a_tensorboard_that_fails_ends_alone"),
    ),
    Row(
        17,
        "run directory read-only, no quota",
        "refused before anything starts; used up in mid-run: older checkpoints kept, nothing partial, resumed bit for bit",
        "read-only tmpfs; Btrfs with a quota, used up (EDQUOT)",
        (EXTRA + "test_a_read_only_place_is_refused", DISKS + "test_a_quota_is_used_up"),
    ),
    Row(
        18,
        "a rank hangs",
        "stacks of all threads, exit code 85",
        "a thread that sleeps",
        ("tests/trainer/test_watchdog.py::test_a_hung_process_says_where_and_ends",),
    ),
    Row(
        19,
        "a rank is stopped",
        "the same, and its peer says where it waits",
        "SIGSTOP",
        ("tests/trainer/test_watchdog.py::test_a_rank_that_stands_still_ends_the_run_with_the_stack_of_its_peer",),
    ),
    Row(
        20,
        "straggler",
        "named with its node, not ended",
        "a rank that sleeps in every step",
        (
            EXTRA + "test_a_rank_that_sleeps_is_named",
            "tests/trainer/test_rank_reports.py::test_a_straggler_is_named_with_its_node_when_it_stays_one",
        ),
    ),
    Row(
        21,
        "loss not finite on one rank",
        "all ranks skip, stop or roll back at the same step; never saved",
        "NaN in one rank's loss",
        (
            GUARDS + "test_every_rank_ends_alike",
            GUARDS + "test_a_mended_run_is_the_run_that_never_had_those_data",
            GUARDS + "test_parameters_that_overflow_are_never_saved",
        ),
        "a processor that computes wrongly: the value is put into one rank's loss",
        real=False,
    ),
    Row(
        22,
        "loss spike",
        "rolled back at most N times, data passed over and on record",
        "a loss made 40 times larger",
        (
            GUARDS + "test_what_was_passed_over_is_on_record",
            GUARDS + "test_too_many_in_a_row_stop_the_run_and_so_do_rollbacks_that_lead_nowhere",
        ),
        "data that make a small model's loss spike by themselves at a chosen step",
        real=False,
    ),
    Row(
        23,
        "crash loop",
        "stops after N attempts without progress and says why",
        "real Slurm, SIGKILL",
        (ENDED, "tests/slurm/test_attempts.py::test_attempts_are_numbered_and_a_loop_without_progress_ends_with_the_reason"),
    ),
    Row(
        24,
        "slurmctld down",
        "a clear error, no job twice",
        "real Slurm, controller killed",
        (EXTRA + "test_the_controller_is_gone_for_a_while", SUBMIT + "test_runs_without_an_answer_shows_what_directories_say"),
    ),
    Row(
        25,
        "controller forgets the job, number given again",
        "told by the token",
        "real Slurm, its controller killed and its memory wiped; answers of squeue and sacct",
        (
            JOBS + "test_the_controller_forgets_and_gives_the_number_again",
            SUBMIT + "test_runs_shows_the_queue_and_knows_a_job_by_its_token",
            SUBMIT + "test_accounting_says_why_a_job_is_gone",
        ),
    ),
    Row(
        26,
        "node lost, drained, set DOWN; node not fit",
        "requeued, to another node; left out; bit for bit",
        "real Slurm: all of a node killed, its states set, a failing check",
        (EXTRA + "test_nodes_are_lost_drained_and_set_down", CLUSTER + "test_the_tasks_of_a_sweep_leave_a_node_that_is_not_fit"),
    ),
    Row(
        27,
        "resumed on another number of ranks",
        "loads, losses equal to rounding",
        "2, 1 and 4 ranks",
        (
            "tests/end_to_end/test_resume.py::test_resume_on_another_number_of_ranks",
            "tests/trainer/test_checkpoint.py::test_saved_on_some_ranks_loads_on_others_bit_identical",
        ),
    ),
    Row(
        28,
        "data: interrupts, epochs, other topologies",
        "no sequence lost or doubled",
        "every cursor",
        (
            DATA + "test_resume_from_every_cursor_equals_the_uninterrupted_run",
            DATA + "test_many_interrupts_with_changing_topology_lose_and_double_nothing",
        ),
    ),
    Row(
        29,
        "TensorBoard after a resume",
        "one point per step",
        "real event files",
        (METRICS + "test_tensorboard_curves_have_one_point_per_step_after_a_resume",),
    ),
    Row(30, "metrics cut in the middle of a line", "repaired", "cut at every byte", (METRICS + "test_a_tear_at_any_byte_is_repaired",)),
    Row(
        31,
        "names and paths that are shell code",
        "data everywhere, or refused",
        "bash and real Slurm",
        (
            "tests/slurm/test_script.py::test_any_text_is_data",
            "tests/slurm/test_script.py::test_nasty_values_are_data",
            CLUSTER + "test_slurm_reads_every_value_as_data",
        ),
    ),
    Row(32, "secret in the environment", "in no script, log, metric or job record", "real Slurm, every file searched", (STORMY,)),
    Row(
        33,
        "hostile configuration",
        "one line naming the key, exit code 2, quickly, in little memory",
        "generated files",
        (
            "tests/test_config_file.py::test_hostile_files_are_refused_quickly_in_little_memory",
            "tests/test_config_file.py::test_any_bytes_give_a_config_or_a_short_message",
        ),
    ),
    Row(
        34,
        "squeue and sacct of other releases",
        "one meaning",
        "their shapes; 22.05 live",
        ("tests/slurm/test_answers.py::test_squeue_in_json", "tests/slurm/test_answers.py::test_sacct_in_json"),
        "23.11 and 24.05 are not installed here: their shapes are read, not their programs",
        real=False,
    ),
    Row(
        35,
        "save in the background on training's group",
        "a group of its own; what is saved is of one moment",
        "real collectives",
        (SAVING + "test_a_background_save_holds_the_values_of_its_moment", SAVING + "test_an_error_in_the_background_surfaces_once"),
    ),
    Row(
        36,
        "the clock is set",
        "no run is ended for it",
        "a clock that jumps by hours",
        (EXTRA + "test_the_clock_jumps",),
        "the machine's clock is everybody's: what the run reads of it is replaced",
        real=False,
    ),
    # Beyond the matrix of the research.
    Row(
        37,
        "network between ranks cut",
        "every rank ends by itself within its limit and says where it waits; the next attempt goes on bit for bit",
        "two network namespaces, the cable between them set down",
        (NETWORK + "test_the_network_between_ranks_is_cut",),
        "on a real Slurm: its nodes would have to live in these namespaces",
    ),
    Row(
        38,
        "shared file system stalls",
        "a short stall is waited for, bit for bit; a long one ends the ranks, though their logs are on it, and the run goes on bit for bit "
        "when it is back",
        "fsfreeze of an ext4; a file system in user space whose server is stopped",
        (DISKS + "test_a_stall_is_waited_for", DISKS + "test_a_stall_without_end_ends_the_ranks"),
        "NFS and Lustre: this kernel has neither",
    ),
    Row(
        39,
        "disk errors (EIO)",
        "in a save: the run fails, older checkpoints kept, resumed bit for bit; in a checkpoint: refused by file, the older one used",
        "a device whose writes fail when they are synced; Btrfs with a bad sector",
        (DISKS + "test_what_was_written_does_not_reach_the_disk", DISKS + "test_a_checkpoint_cannot_be_read_any_more"),
    ),
    Row(
        40,
        "all of it in one run: time limit, preemption, rank killed, checkpoint damaged, node drained, cancelled, crash loop",
        "the losses and the data of a run that nothing happened to, bit for bit",
        "real Slurm, two nodes of two ranks",
        (EVERYTHING,),
    ),
    Row(
        41,
        "the same to a run of the second engine: warned, a rank killed",
        "requeued, resumed bit for bit",
        "real Slurm, two nodes, DeepSpeed's ZeRO-3",
        (JOBS + "test_a_job_of_the_second_engine",),
    ),
    Row(
        42,
        "a cluster that does not requeue",
        "saved; the next job of a chain goes on, those behind the last are cancelled",
        "real Slurm, Requeue=0",
        (JOBS + "test_a_chain_where_jobs_are_not_requeued",),
    ),
)
MATRIX = 36
"""So many rows are those of the research; what follows was asked for besides."""
SAMPLE = (30, 34)
"""Rows that take seconds: what the default suite runs of the battery."""
