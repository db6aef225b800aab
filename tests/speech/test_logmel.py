import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransfer.speech.logmel import log_mel


@pytest.fixture(scope="module")
def library():
    from transformers import WhisperFeatureExtractor

    return {bands: WhisperFeatureExtractor(feature_size=bands) for bands in (80, 128)}


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6 * 16_000),
    st.sampled_from([0.5, 1.0, 3.5, 5.0, 30.0]),
    st.sampled_from([80, 128]),
    st.floats(1e-4, 1.0),
    st.integers(0, 9),
)
def test_features_are_the_librarys(library, samples, context_s, bands, loudness, seed):
    noise = np.random.default_rng(seed).standard_normal(samples)
    clip = (loudness * noise / 4).astype(np.float32)
    expected = library[bands](
        [clip],
        sampling_rate=16_000,
        return_tensors="np",
        padding="max_length",
        max_length=round(context_s * 16_000),
        truncation=True,
    )
    found = log_mel([clip], context_s, bands=bands)
    np.testing.assert_allclose(found, expected.input_features, atol=2e-4)


def test_silence_and_no_samples_at_all_have_the_lowest_value():
    for clip in (np.zeros(16_000, np.float32), np.zeros(0, np.float32)):
        np.testing.assert_allclose(log_mel([clip], 2.0), -1.5, atol=1e-6)


def test_features_do_not_depend_on_threads():
    """To the last bit, for a text may depend on it."""
    program = (
        "import hashlib, numpy as np; from mmtransfer.speech.logmel import log_mel;"
        "clip = np.random.default_rng(0).standard_normal(48_000).astype(np.float32);"
        "print(hashlib.sha256(log_mel([clip], 3.0).tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1
