"""What training promises, sentence by sentence, and the tests that hold it to that."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

INVARIANTS = {
    "a policy that is the reference starts at ln 2, another is refused, on every rank": [
        "unit/test_step_zero.py::test_a_policy_that_is_the_reference_starts_at_ln_2_and_another_is_refused_on_every_rank",
        "integration/test_train.py::test_ten_updates_equal_plain_pytorch_on_one_rank_and_on_two",
        "integration/test_train_adapter.py::test_an_adapter_is_trained_partitioned_and_recomputing_and_saved_as_an_adapter",
    ],
    "every layout of a batch gives the same log-probabilities, and its gradient": [
        "unit/test_pair_scorer.py::test_the_right_layout_is_chosen_and_equals_one_by_one_scoring",
        "unit/test_pair_scorer.py::test_every_layout_gives_the_same_numbers_in_any_order_and_company",
        "unit/test_pair_scorer.py::test_gradients_equal_those_of_plain_scoring",
        "unit/test_tree_attention.py::*",
    ],
    "the chunked head equals whole logits in values and gradients, and never holds them": [
        "unit/test_completion_head.py::test_values_and_gradients_equal_those_of_whole_logits",
        "unit/test_completion_head.py::test_logits_of_more_than_one_chunk_never_exist",
    ],
    "any split of a global batch into ranks and micro-batches gives the same gradient": [
        "unit/test_policy_engine.py::test_any_split_into_micro_batches_gives_the_same_gradient",
        "unit/test_sorted_partners.py::test_any_split_gives_the_gradient_of_the_whole_batch",
    ],
    "metrics do not depend on ranks and accumulation": [
        "unit/test_metrics.py::test_numbers_do_not_depend_on_the_split_into_ranks_and_micro_steps",
    ],
    "every rank does the same number of micro-steps, every pair once, within the token budget": [
        "unit/test_dealing.py::test_dealing_gives_every_pair_once_the_same_micro_steps_to_all_and_keeps_the_budget",
        "unit/test_dealing.py::test_ranks_are_balanced_within_one_percent_of_the_best_on_real_lengths",
    ],
    "an epoch holds every pair once, and a batch depends on nothing but mixture, seed and step": [
        "unit/test_global_batches.py::test_an_epoch_holds_every_pair_once_and_only_its_last_batch_is_short",
        "unit/test_global_batches.py::test_a_batch_does_not_depend_on_the_batches_asked_for_before",
        "unit/test_pair_order.py::*",
    ],
    "ZeRO 0, 1, 2 and 3 and plain PyTorch agree": [
        "unit/test_policy_engine.py::test_every_zero_stage_on_two_ranks_trains_as_plain_pytorch",
        "unit/test_policy_engine.py::test_bfloat16_trains_float32_masters_and_counts_adams_steps_right_at_every_stage",
        "unit/test_offload.py::test_offloaded_and_doubly_partitioned_state_trains_the_same",
    ],
    "thirty updates follow the curve of TRL's trainer": [
        "integration/test_trl_curves.py::test_thirty_updates_follow_the_curve_of_trl",
    ],
    "a killed and resumed run equals one never stopped, in metrics and weights, killed while saving too": [
        "integration/test_train.py::test_a_run_killed_and_resumed_equals_one_never_stopped",
        "integration/test_train_killed.py::test_a_run_killed_while_saving_and_at_random_moments_equals_one_never_stopped",
    ],
    "a run resumed on another number of ranks goes on at the next pair": [
        "integration/test_train.py::test_resuming_on_one_rank_instead_of_two_goes_on_at_the_next_pair",
        "unit/test_checkpoints.py::test_resuming_is_exact_and_works_on_another_number_of_ranks",
    ],
    "a half-written checkpoint is skipped and named": [
        "unit/test_checkpoints.py::test_a_checkpoint_is_marked_once_the_slowest_rank_has_written_its_part",
        "unit/test_checkpoints.py::test_a_checkpoint_that_is_not_whole_is_skipped_and_named",
    ],
    "a learning rate is a function of the step": [
        "unit/test_learning_rate.py::test_every_step_is_that_of_transformers",
    ],
    "a loss or gradient that is not finite stops all ranks before the update, with the keys in a file": [
        "unit/test_policy_engine.py::test_a_loss_or_gradient_that_is_not_finite_stops_all_ranks_before_the_update",
    ],
    "a cache scored in another dtype or with another kernel is refused unless asked for by name": [
        "integration/test_train_refusals.py::test_other_numerics_than_the_caches",
        "integration/test_train_refusals.py::test_a_policy_that_is_not_the_reference",
    ],
    "no value that no reference gives is ever trained on": [
        "integration/test_train_refusals.py::test_a_value_that_no_reference_gives_names_count_and_key",
        "integration/test_train_refusals.py::test_a_damaged_shard",
    ],
    "every loss is its equation": [
        "unit/test_losses.py::test_a_loss_is_its_equation",
        "unit/test_losses.py::test_values_and_gradients_are_those_of_trl",
    ],
    "a mixture of experts trains as in plain PyTorch, its balancing loss included": [
        "unit/test_expert_blocks.py::test_a_partitioned_mixture_of_experts_trains_as_plain_pytorch_with_its_balancing_loss",
    ],
    "an adapter trains as in plain PyTorch, and is saved whole or merged": [
        "unit/test_lora_adapter.py::test_an_adapter_trains_as_in_plain_pytorch_resumes_exactly_and_is_saved_whole_or_merged",
    ],
    "a saved model loads and answers as the policy": [
        "unit/test_model_export.py::test_a_trained_model_loads_with_from_pretrained_and_answers_as_the_policy",
    ],
    "loading at stage 3 never holds the whole model on a rank": [
        "unit/test_partitioned_loading.py::test_two_ranks_hold_half_each_and_a_file_in_hand",
    ],
    "saving at stage 3 never holds more than a file and a weight on a rank": [
        "unit/test_weight_files.py::test_two_ranks_hold_no_more_than_a_file_and_a_weight_while_they_save",
    ],
    "all ranks run one configuration on the same pairs, under any launcher": [
        "integration/test_ranks_that_differ.py::test_another_learning_rate_is_refused_by_name",
        "integration/test_ranks_that_differ.py::test_another_cache_is_refused",
        "integration/test_train.py::test_other_launchers_start_the_same_ranks",
    ],
    "a failed upload leaves the run successful": [
        "integration/test_push_to_hub.py::test_a_failed_upload_leaves_the_run_successful_and_its_command_repeats_it",
    ],
}


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_is_held_by_tests_that_exist(invariant: str) -> None:
    for test in INVARIANTS[invariant]:
        file, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        assert functions if name == "*" else name in functions, test
