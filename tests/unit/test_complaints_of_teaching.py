"""What users of other programs complain of after pre-training, and the tests that it does not happen here; or why it cannot."""

import re

import pytest

from tests.fakes.runs import ROOT

NOT_HERE = "not here: "
COMPLAINTS = {  # what, and where it was said: the tests of it
    "a model never stops after sft (TRL #1623, unsloth #416, axolotl #1806)": (
        "test_what_it_was_taught_it_answers",
        "test_both_backends_learn_what_is_preferred_though_they_are_killed",
    ),
    "everything is masked and the loss is 0 (unsloth #2900 #2095)": (
        "test_rows_that_teach_nothing_are_dropped_counted_and_shown",
        "test_what_is_trained_and_what_was_dropped_is_shown",
    ),
    "the end of a turn is never trained (axolotl #3754)": (
        "test_an_answer_is_trained_from_its_first_token_to_its_end_and_nothing_else",
        "test_both_answers_follow_the_same_ids_and_are_trained_to_their_ends",
    ),
    "only the last turn of the assistant is trained (axolotl #1761, Soup #683)": ("test_replies_are_found_in_a_whole_talk",),
    "the mask is all ones and nobody says so (Megatron-Bridge #3359, nanochat #570)": (
        "test_a_template_that_hides_its_answers_is_refused_and_its_refusals_are_dropped",
        "test_what_is_trained_and_what_was_dropped_is_shown",
    ),
    "NaN of rows without targets (nanochat #590, TRL #3382 #6548)": (
        "test_loss_of_a_batch_without_counted_targets_is_zero_and_finite",
        "test_nothing_overflows_where_answers_are_certain_or_impossible",
        "test_a_pair_that_does_not_fit_is_dropped_whole_and_so_is_one_that_the_tokenizer_cannot_tell",
    ),
    "accumulation changes the result (transformers #34191 #37766)": (
        "test_accumulation_that_weighs_parts_instead_of_tokens_is_caught",
        "test_parts_of_a_step_of_pairs_are_weighed_by_their_pairs",
    ),
    "padding is trained (mlx-lm PR 1697)": (
        "test_validation_sees_every_row_once_and_its_padding_counts_nothing",
        "test_batches_leave_out_what_is_not_trained",
    ),
    "the beginning of a text twice (TRL #1400)": ("test_a_prompt_has_the_tokens_of_its_text_and_no_more",),
    "packed samples see each other (TRL #3067)": (
        "test_other_documents_change_no_bit",
        "test_packing_never_parts_a_pair_and_knows_its_documents",
    ),
    "a merged model differs from its adapter (peft #2502, unsloth #2142, mlx-examples #757, litgpt #1224)": (
        "test_the_model_is_the_base_and_what_was_learned",
        "test_loss_and_gradients_are_those_of_the_merged_model",
    ),
    "an adapter loses its scale or rank (mlx-examples #622)": (
        "test_the_model_is_the_base_and_what_was_learned",
        "test_a_checkpoint_has_adapters_alone_and_the_base_is_as_it_was",
    ),
    "preferences are compared with the wrong reference (TRL #1340 #2423)": (
        "test_the_reference_gives_what_its_weights_give_by_definition",
        "test_a_run_keeps_its_reference_by_hash_and_needs_the_weights_no_more",
        "test_it_begins_at_ln_2_and_tells_how_the_answers_go_apart",
    ),
    "better answers become less probable and nothing explains it (TRL #800)": (
        "test_better_answers_that_become_less_probable_are_told_once",
        "test_a_rate_that_breaks_the_model_is_told_of",
    ),
    "one bad row kills the set, without its number (axolotl #325 #290 #3231)": (
        "test_a_wrong_row_is_an_error_with_its_line",
        "test_what_is_wrong_is_an_error_with_its_line",
    ),
    "a tiny validation set fails when it is packed (axolotl #1644 #999)": (
        "test_validation_sees_every_row_once_and_its_padding_counts_nothing",
        "test_validation_sees_every_pair_once",
    ),
    "a resumed run sees other data (transformers PR 40691, verl #3457)": (
        "test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been",
        "test_a_run_that_is_killed_at_any_step_has_the_same_bits",
        "test_a_batch_depends_on_the_step_alone",
    ),
    "the question is trained, against the documentation (litgpt #1987, mlx-examples #1313)": (
        "test_an_answer_is_trained_from_its_first_token_to_its_end_and_nothing_else",
        "test_the_question_is_all_that_both_begin_with_and_its_answers_are_not_trained",
    ),
    "control tokens in the text of a user are obeyed (transformers #29279)": ("test_a_control_token_in_a_message_is_text",),
    "the vocabulary of a teacher is a few rows larger (TRL #3028)": ("test_a_teacher_of_more_tokens_gives_the_rows_of_the_student",),
    "out of memory late, at the first long sample of GRPO (unsloth #1624)": (
        NOT_HERE + "nothing is sampled while training; rows have one length, so the first step takes the memory of all",
    ),
    "a template does not mark what an assistant says (TRL #4879)": (
        "test_replies_are_found_in_a_whole_talk",
        "test_a_template_that_changes_earlier_turns_is_refused_for_training_alone",
    ),
    "mlx-lm has no DPO (mlx-lm PR 7)": (
        "test_both_backends_learn_what_is_preferred_though_they_are_killed",
        "test_losses_and_derivatives_are_those_of_trl",
    ),
}


@pytest.fixture(scope="module")
def tests():
    """The names of all tests."""
    return {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_a_complaint_has_its_tests_or_cannot_be(complaint, tests):
    found = [name for name in COMPLAINTS[complaint] if not name.startswith(NOT_HERE)]
    assert set(found) <= tests
    assert COMPLAINTS[complaint]
