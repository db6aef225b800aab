import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from conftest import TEXT_ARCHITECTURES, WAVE_ARCHITECTURES, random_text_model, random_wave_model

from mmtransfer.errors import UserError
from mmtransfer.transfer.encoders import TextEncoder, speech_encoder


@pytest.mark.parametrize("kind", TEXT_ARCHITECTURES)
def test_starting_at_any_layer_equals_the_whole_text_model(kind):
    model = random_text_model(kind, labels=3)
    encoder = TextEncoder(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = model.config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        states = encoder.hidden_states(range(encoder.depth + 1), inputs)
        for index in range(encoder.depth):
            torch.testing.assert_close(states[index], whole.hidden_states[index])
        output = model.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(states[encoder.depth], output)
        for start in range(encoder.depth):
            rest = {"hidden": states[start], "mask": mask}
            above = encoder.hidden_states([start, encoder.depth], rest, start=start)
            torch.testing.assert_close(above[encoder.depth], output)
            assert above[start] is states[start]
            torch.testing.assert_close(encoder.logits(rest, start=start), whole.logits)
        rest = {"hidden": encoder.last_before_norm(inputs), "mask": mask}
        torch.testing.assert_close(encoder.logits(rest, start=encoder.depth), whole.logits)
        # Nothing stays replaced.
        torch.testing.assert_close(model(**inputs).logits, whole.logits)


def test_layers_above_the_highest_kept_one_are_not_run():
    encoder = TextEncoder(random_text_model("bert"))
    ran = []
    for index, layer in enumerate(encoder.layers, 1):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    ids = torch.tensor([[5, 6, 7]])
    encoder.hidden_states([1], {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert ran == [1]


@pytest.mark.parametrize("keep", [[1, 2, 3], [2]], ids=["whole", "cut"])
def test_threads_with_one_model_get_their_own_states(keep):
    encoder = TextEncoder(random_text_model("bert"))
    texts = [{"input_ids": torch.full((2, 5), token)} for token in (7, 8)]
    expected = [encoder.hidden_states(keep, text) for text in texts]
    other_thread = threading.Barrier(2)

    def wait(*_):  # in the middle of the forward pass, for as long as another may come in
        with suppress(threading.BrokenBarrierError):
            other_thread.wait(0.5)

    encoder.layers[0].register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: encoder.hidden_states(keep, text), texts))
    for own, wanted in zip(found, expected, strict=True):
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[layer], wanted[layer]) for layer in keep)
    assert len(encoder.layers) == encoder.depth


def test_a_copy_of_a_model_waits_for_nobody_but_its_own_threads():
    encoder = TextEncoder(random_text_model("bert"))
    with encoder._forward_pass:
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert other.hidden_states([1], {"input_ids": torch.tensor([[5, 6]])}).keys() == {1}


@pytest.mark.parametrize("kind", WAVE_ARCHITECTURES)
def test_starting_at_any_layer_equals_the_whole_speech_model(kind):
    model = random_wave_model(kind)
    encoder = speech_encoder(model)
    inputs = {"values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        whole = model(inputs["values"]).last_hidden_state
        states = encoder.hidden_states(range(encoder.depth + 1), inputs)
        torch.testing.assert_close(states[encoder.depth], whole)
        assert whole.shape[1] == encoder.frames(4000)
        for start in range(encoder.depth + 1):
            rest = {"hidden": states[start]}
            above = encoder.hidden_states([encoder.depth], rest, start=start)
            torch.testing.assert_close(above[encoder.depth], whole)


def test_whisper_encoder_equals_its_own_at_the_full_window(random_whisper):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(random_whisper).get_encoder()
    encoder = speech_encoder(model.eval())
    features = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encoder.hidden_states([1, 2], {"features": features})
        torch.testing.assert_close(states[2], model(features).last_hidden_state)
        above = encoder.hidden_states([2], {"hidden": states[1]}, start=1)
        torch.testing.assert_close(above[2], states[2])


def test_other_architectures_are_refused_by_name():
    from transformers import GPT2Config, GPT2Model

    with pytest.raises(UserError, match=r"gpt2: .*expected a"):
        TextEncoder(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)))
    with pytest.raises(UserError, match="bert: expected a speech encoder"):
        speech_encoder(random_text_model("bert"))
