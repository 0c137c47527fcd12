"""A secret is text for whoever asks for it, and a mask for everybody else."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback

import pytest

from ael_store.errors import InvalidValueType
from ael_store.model.secret import Secret, masked
from ael_store.model.values import encode

MASK = "Secret('TOKEN', ******)"


@pytest.fixture
def secret() -> Secret:
    return Secret("abc", "TOKEN")


def test_secret_is_masked_however_it_is_printed(secret):
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r}", "%s" % secret, "{}".format(secret)]  # noqa: UP031, UP032

    assert set(shown) == {MASK}
    assert f"{secret:>25}" == MASK.rjust(25)
    assert repr([secret]) == f"[{MASK}]"


def test_secret_is_masked_in_logs_and_tracebacks(secret, caplog):
    logging.getLogger("test").warning("token %s, %r", secret, {"token": secret})
    try:
        raise ValueError(secret)
    except ValueError:
        logged = caplog.text + traceback.format_exc()

    assert "abc" not in logged
    assert logged.count(MASK) == 3


def test_reveal_returns_plain_text(secret):
    assert secret.reveal() == "abc"
    assert type(secret.reveal()) is str
    assert secret.name == "TOKEN"


def test_secret_fits_where_text_is_wanted(secret):
    assert isinstance(secret, str)
    assert secret == "abc"
    assert secret.encode() == b"abc"


def test_secret_of_a_secret_keeps_the_text(secret):
    assert Secret(secret, "OTHER").reveal() == "abc"


def test_secret_stays_masked_when_it_is_copied(secret):
    assert copy.copy(secret) is secret
    assert copy.deepcopy({"token": secret})["token"] is secret


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_secret_can_not_be_pickled(secret, protocol):
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(secret, protocol)


@pytest.mark.parametrize("wrap", [lambda secret: secret, lambda secret: {"a": [secret]}])
def test_state_and_events_refuse_a_secret(secret, wrap):
    with pytest.raises(InvalidValueType) as caught:
        encode(wrap(secret), "state key 'a'")

    assert "Secret" in str(caught.value)
    assert "abc" not in str(caught.value)


def test_masked_replaces_secrets_at_any_depth(secret):
    value = {"token": secret, "list": [1, (secret, "x")], "n": None}

    assert masked(value) == {"token": MASK, "list": [1, [MASK, "x"]], "n": None}
