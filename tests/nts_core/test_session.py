"""The life of a session (RFC 8915 sections 4.2, 5.7 and 8.5; RFC 5905 section 7.4), without a network."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nts_core.aead import AeadId, SessionKeys
from nts_core.session import (
    CHECKED_ANSWERS,
    DAY,
    MAX_INTERVAL,
    MAX_RETRY,
    MIN_INTERVAL,
    MIN_RETRY,
    REFRESH_AFTER,
    SECOND,
    UNREACHED_RETRY,
    WITHOUT_COOKIES,
    CertificateTime,
    Credentials,
    EstablishAt,
    Phase,
    PollAt,
    Session,
    Setback,
    Stop,
    retry_interval,
)

INTERVAL = 64 * SECOND
KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, b"c" * 32, b"s" * 32)
OTHER_KEYS = SessionKeys(AeadId.AES_SIV_CMAC_256, b"C" * 32, b"S" * 32)
BEFORE, AFTER = 1_000 * DAY, 1_090 * DAY
INSIDE = 1_045 * DAY
_numbers = itertools.count()


def fresh_cookies(count=8):
    return tuple(b"cookie %d" % next(_numbers) for _ in range(count))


def credentials(cookies=8, **changes):
    values = {
        "keys": KEYS,
        "cookies": fresh_cookies(cookies),
        "host": "192.0.2.1",
        "port": 123,
        "not_before": BEFORE,
        "not_after": AFTER,
        "certificate_time": CertificateTime.STRICT,
    }
    return Credentials(**(values | changes))


class Story:
    """A session and its time, so that a test reads as what happens."""

    def __init__(self, session=None, now=0, interval=INTERVAL):
        self.now = now
        self.session = session or Session(now, interval)

    @property
    def action(self):
        return self.session.next(self.now)

    def wait(self):
        self.now = max(self.now, self.action.at)
        return self

    def establish(self, **changes):
        assert isinstance(self.action, EstablishAt), self.action
        self.wait()
        spare = changes.pop("spare", 0)
        self.session.establishing(self.now)
        self.session.established(credentials(**changes), self.now, spare=spare)
        return self

    def fail(self, setback=Setback.FAILED):
        assert isinstance(self.action, EstablishAt), self.action
        self.wait()
        self.session.establishing(self.now)
        self.session.establishment_failed(setback, self.now)
        return self

    def poll(self):
        assert isinstance(self.action, PollAt), self.action
        self.wait()
        self.session.polling(self.now)
        return self

    def answer(self, time=INSIDE, new=1):
        self.poll()
        assert self.session.answered(self.session.credentials.cookies + fresh_cookies(new), time)
        return self

    def kiss(self, code):
        self.poll()
        self.session.kissed(code, self.session.credentials.cookies + fresh_cookies(1), self.now)
        return self

    def silence(self):
        self.poll().session.unanswered(self.now, is_nak=False)
        return self

    def nak(self):
        self.poll().session.unanswered(self.now, is_nak=True)
        return self


# The beginning


def test_it_begins_with_key_establishment_at_once():
    assert Story(now=5).action == EstablishAt(5)


def test_then_it_polls_at_once_and_at_the_interval():
    story = Story().establish()
    assert story.action == PollAt(0)
    assert story.answer().action == PollAt(INTERVAL)
    assert story.answer().action == PollAt(2 * INTERVAL)


def test_kept_cookies_need_no_key_establishment():
    session = Session.resume(credentials(1), 0, INTERVAL, age=DAY)
    assert Story(session).action == PollAt(0)


def test_kept_credentials_without_a_cookie_are_of_no_use():
    session = Session.resume(credentials(0), 0, INTERVAL, age=DAY)
    assert Story(session).action == EstablishAt(0)


def test_a_poll_takes_the_oldest_cookie_away():
    story = Story().establish()
    first, *rest = story.session.credentials.cookies
    used = story.session.polling(story.now)
    assert used.cookies[0] == first
    assert story.session.credentials.cookies == tuple(rest)


# NTSN


@pytest.mark.rfc8915("5.7-38")
def test_one_ntsn_changes_nothing():
    """RFC 8915 section 5.7: wait for the next poll. Anybody can forge one."""
    story = Story().establish().answer().nak()
    assert story.session.phase is Phase.DOUBTED
    assert story.action == PollAt(2 * INTERVAL)
    story.answer()
    assert story.session.phase is Phase.KEYED
    assert story.nak().session.phase is Phase.DOUBTED


@pytest.mark.rfc8915("5.7-38")
@pytest.mark.parametrize("second", [Story.nak, Story.silence])
def test_ntsn_and_then_no_valid_answer_renews_the_keys(second):
    story = second(Story().establish().answer().answer().nak())
    assert isinstance(story.action, EstablishAt)
    assert story.action.at <= story.now


@pytest.mark.rfc8915("5.7-40")
def test_old_cookies_stay_in_use_while_key_establishment_fails():
    story = Story().establish().answer().answer().nak().nak()
    left = story.session.credentials.cookies
    story.fail()
    assert story.session.credentials.cookies == left
    assert story.action == EstablishAt(story.now + MIN_RETRY)
    story.fail().fail().fail()
    assert story.action == PollAt(4 * INTERVAL)
    assert story.session.polling(story.now).cookies == left


def test_a_valid_answer_ends_the_renewal():
    story = Story().establish().answer().answer().nak().nak().fail().fail().fail().fail()
    assert story.answer().session.phase is Phase.KEYED
    assert isinstance(story.action, PollAt)


@pytest.mark.rfc8915("4.2-3")
def test_a_valid_answer_with_the_old_keys_does_not_reset_the_back_off():
    story = Story().establish().answer().answer().nak().nak().fail().fail().fail().fail()
    story.answer().nak().nak().fail()
    assert story.session.next(story.now + DAY) == EstablishAt(story.now + retry_interval(5))


@pytest.mark.rfc8915("5.7-39")
def test_fresh_credentials_replace_all_old_ones():
    story = Story().establish().answer().nak().nak()
    old = set(story.session.credentials.cookies)
    story.establish(keys=OTHER_KEYS)
    assert story.session.credentials.keys == OTHER_KEYS
    assert not old & set(story.session.credentials.cookies)


@pytest.mark.rfc8915("5.7-9")
def test_silence_alone_uses_the_cookies_up_and_then_renews():
    story = Story().establish().answer()
    for _ in range(8):
        assert isinstance(story.action, PollAt)
        story.silence()
    assert story.session.phase is Phase.EMPTY
    assert isinstance(story.action, EstablishAt)


@pytest.mark.parametrize("first", [Story.nak, Story.silence])
@pytest.mark.parametrize("second", [Story.nak, Story.silence])
def test_kept_keys_are_given_up_after_two_polls_in_vain(first, second):
    story = second(first(Story(Session.resume(credentials(), 0, INTERVAL, age=DAY))))
    assert isinstance(story.action, EstablishAt)
    assert story.action.at <= story.now


def test_a_server_that_gives_no_cookies():
    story = Story().establish(cookies=1).answer(new=0)
    assert story.session.phase is Phase.EMPTY
    assert story.action == EstablishAt(WITHOUT_COOKIES), "it is not asked for keys at each poll"


# Alternative keys


def test_alternative_keys_are_tried_once_and_at_once():
    story = Story().establish(alternative=OTHER_KEYS).nak()
    assert story.session.credentials.keys == OTHER_KEYS
    assert story.action == PollAt(0)
    story.nak()
    assert story.session.credentials.keys == OTHER_KEYS
    assert story.session.phase is Phase.DOUBTED


def test_silence_is_no_reason_for_other_keys():
    assert Story().establish(alternative=OTHER_KEYS).silence().session.credentials.keys == KEYS


def test_keys_that_worked_are_not_changed_any_more():
    story = Story().establish(alternative=OTHER_KEYS).answer().nak().nak()
    assert story.session.credentials.keys == KEYS


# Kiss codes


@pytest.mark.rfc8915("5.7-36")
@pytest.mark.parametrize("code", ["DENY", "RSTR"])
def test_a_refusal_ends_it(code):
    story = Story().establish().answer().kiss(code)
    assert story.action == Stop(code)
    story.now += 1000 * DAY
    assert story.action == Stop(code)
    assert story.session.credentials is None


@pytest.mark.rfc8915("5.7-36")
def test_rate_doubles_the_interval_for_good():
    story = Story().establish().answer().kiss("RATE")
    assert story.action == PollAt(story.now + 2 * INTERVAL)
    story.kiss("RATE")
    assert story.action == PollAt(story.now + 4 * INTERVAL)
    story.answer().answer()
    assert story.action == PollAt(story.now + 4 * INTERVAL)
    story.session.interval = SECOND
    assert story.answer().action == PollAt(story.now + 4 * INTERVAL)


def test_rate_also_slows_a_burst_down_and_has_an_end():
    story = Story(interval=0).establish().kiss("RATE")
    assert story.action == PollAt(MIN_INTERVAL)
    for _ in range(16):
        story.kiss("RATE")
    assert story.session.rate_floor == MAX_INTERVAL


def test_rate_holds_for_the_poll_after_key_establishment():
    story = Story().establish().answer().kiss("RATE").nak()
    before = story.now
    story.nak()
    assert story.now == before + 2 * INTERVAL
    assert story.establish().action == PollAt(story.now + 2 * INTERVAL)


def test_rate_of_an_earlier_run_still_holds():
    story = Story(Session.resume(credentials(), 0, 0, age=0, rate_floor=99 * SECOND))
    assert story.answer().action == PollAt(99 * SECOND)


@pytest.mark.parametrize("code", ["INIT", "STEP", "XFOO", "ACST"])
def test_other_kisses_have_no_effect(code):
    assert Story().establish().kiss(code).action == PollAt(INTERVAL)


# Back-off


@pytest.mark.rfc8915("4.2-2")
def test_the_back_off_of_section_4_2():
    assert [retry_interval(n) for n in (1, 2, 3)] == [10 * SECOND, 15 * SECOND, 22_500_000_000]
    assert retry_interval(27) < retry_interval(28) == MAX_RETRY == retry_interval(10**9)


@pytest.mark.rfc8915("4.2-1", "4.2-2")
def test_each_failure_makes_the_next_wait_longer():
    story = Story()
    waits = []
    for _ in range(40):
        before = story.fail().now
        waits.append(story.action.at - before)
    assert waits == [retry_interval(n) for n in range(1, 41)]


@pytest.mark.rfc8915("4.2-3", "5.7-37")
def test_key_establishment_alone_does_not_reset_the_back_off():
    story = Story(interval=0)
    for attempt in range(1, 6):
        story.establish(cookies=1)
        started = story.now
        assert story.silence().action == EstablishAt(started + retry_interval(attempt))


def test_both_together_reset_it():
    story = Story(interval=0).fail().fail().fail().establish(cookies=1)
    started = story.now
    assert story.answer(new=0).action == EstablishAt(started + WITHOUT_COOKIES)
    assert story.fail().action == EstablishAt(story.now + retry_interval(1))


@pytest.mark.rfc8915("4.1.3-6", "4.1.3-8")
def test_errors_0_and_1_are_not_answered_with_the_same_request():
    story = Story().fail(Setback.UNACCEPTABLE)
    assert story.action == EstablishAt(MAX_RETRY)


def test_what_never_reached_the_server_does_not_count():
    story = Story()
    for _ in range(30):
        before = story.fail(Setback.UNREACHED).now
        assert story.action == EstablishAt(before + UNREACHED_RETRY)
    assert story.fail().action == EstablishAt(story.now + retry_interval(1))


def test_other_addresses_belong_to_the_same_attempt():
    """Where NTP does not work at one address, the next is tried at once; then the back-off rules."""
    story = Story(interval=0).establish(spare=1).silence()
    assert story.action == EstablishAt(story.now)
    story.establish(spare=0)
    started = story.now
    for _ in range(8):
        story.silence()
    assert story.action == EstablishAt(started + retry_interval(1))


def test_one_silent_poll_is_enough_where_another_address_is_left():
    """The next poll may be minutes away, and it would go to the same address."""
    story = Story().establish(spare=2).silence()
    assert story.action == EstablishAt(story.now)
    story.establish(spare=1).silence()
    assert story.action == EstablishAt(story.now)
    assert story.establish(spare=0).silence().action == PollAt(INTERVAL)


def test_an_address_that_answered_is_not_left_for_another():
    story = Story().establish(spare=1).answer().silence()
    assert isinstance(story.action, PollAt)
    assert story.session.phase is Phase.KEYED


@pytest.mark.rfc8915("4.2-1")
def test_a_spare_address_that_cannot_be_reached_does_not_hold_the_back_off_down():
    """A name with two addresses, on a host that has IPv4 only, where NTP is blocked."""
    story = Story(interval=DAY)
    for attempt in range(1, 12):
        story.establish(spare=1).silence().fail(Setback.UNREACHED)
        assert story.action == EstablishAt(story.now + retry_interval(attempt))


# Refreshing


def test_keys_that_work_are_renewed_after_four_weeks():
    story = Story().establish()
    while isinstance(story.action, PollAt):
        story.answer()
    assert story.now == pytest.approx(REFRESH_AFTER, abs=INTERVAL)
    story.fail().answer().fail().fail()
    assert story.session.phase is Phase.KEYED


def test_the_age_of_kept_keys_counts():
    session = Session.resume(credentials(), 0, INTERVAL, age=REFRESH_AFTER)
    assert Story(session).action == EstablishAt(0)
    session = Session.resume(credentials(), 0, INTERVAL, age=-DAY)
    assert Story(session).action == PollAt(0)


# Time and certificate


@pytest.mark.rfc8915("8.5-4")
@pytest.mark.parametrize("time", [BEFORE - 1, AFTER + 1])
def test_an_answer_outside_of_the_certificate_discards_everything(time):
    story = Story().establish().poll()
    assert not story.session.answered(fresh_cookies(8), time)
    assert story.session.credentials is None
    assert story.action == EstablishAt(MIN_RETRY)


@pytest.mark.parametrize("time", [BEFORE, AFTER])
def test_the_ends_of_the_validity_belong_to_it(time):
    Story().establish().answer(time)


def test_a_certificate_may_end_while_its_keys_are_in_use():
    """RFC 8915 section 8.5: no key establishment for that alone."""
    story = Story().establish()
    for _ in range(CHECKED_ANSWERS):
        story.answer()
    assert story.answer(AFTER + DAY).session.phase is Phase.KEYED


class AnyLife(RuleBasedStateMachine):
    """Whatever happens in whatever order: the promises that others rely on."""

    @initialize(
        kept=st.none() | st.integers(1, 8),
        alternative=st.booleans(),
        interval=st.sampled_from([0, SECOND, INTERVAL]),
    )
    def begin(self, kept, alternative, interval):
        self.now = 0
        self.used = set()
        self.attempts = 0
        self.last_attempt = None
        self.minimum = 0
        self.was_good = False
        self.spare = 0
        self.in_vain = 0
        self.rate = 0
        self.last_poll = None
        self.refreshed = 0
        self.stopped = False
        other = OTHER_KEYS if alternative else None
        if kept is None:
            self.session = Session(0, interval)
        else:
            self.session = Session.resume(credentials(kept, alternative=other), 0, interval, age=0)

    def is_(self, kind):
        return isinstance(self.session.next(self.now), kind)

    @rule(extra=st.sampled_from([0, 1, SECOND, INTERVAL, DAY]))
    def time_passes(self, extra):
        self.now += extra

    @precondition(lambda self: self.is_(EstablishAt))
    @rule(
        outcome=st.sampled_from([None, *Setback]),
        cookies=st.integers(1, 8),
        spare=st.integers(0, 2),
        alternative=st.booleans(),
    )
    def establish(self, outcome, cookies, spare, alternative):
        session = self.session
        self.now = max(self.now, session.next(self.now).at)
        is_same_attempt = self.spare > 0
        if self.last_attempt is not None and not is_same_attempt:
            assert self.now - self.last_attempt >= self.minimum
        has_cookies = session.credentials is not None and session.credentials.cookies
        if has_cookies and self.now < self.refreshed + REFRESH_AFTER:
            assert self.in_vain >= 2, "only two polls in vain, one after the other, renew keys that are there"
        before = session.credentials
        session.establishing(self.now)
        if is_same_attempt:
            self.spare -= 1
        else:
            self.attempts += 1
            self.last_attempt = self.now
        if outcome is None:
            other = OTHER_KEYS if alternative else None
            self.spare = min(spare, self.spare) if is_same_attempt else spare
            session.established(credentials(cookies, alternative=other), self.now, spare=self.spare)
            self.was_good = True
            self.in_vain = 0
            self.refreshed = self.now
            self.minimum = retry_interval(self.attempts)
            return
        session.establishment_failed(outcome, self.now)
        self.spare = 0
        self.was_good = False
        assert session.credentials == before, "old cookies stay until key establishment succeeds"
        if outcome is Setback.UNREACHED and not is_same_attempt:
            self.attempts -= 1
        self.minimum = MAX_RETRY if outcome is Setback.UNACCEPTABLE else retry_interval(max(self.attempts, 1))

    @precondition(lambda self: self.is_(PollAt))
    @rule(
        outcome=st.sampled_from(["answer", "wrong time", "silence", "nak", "RATE", "DENY", "INIT", "unsent"]),
        new=st.integers(0, 8),
    )
    def poll(self, outcome, new):
        session = self.session
        self.now = max(self.now, session.next(self.now).at)
        if self.last_poll is not None:
            assert self.now - self.last_poll >= self.rate
        self.last_poll = self.now
        used = session.polling(self.now)
        cookie = used.cookies[0]
        assert cookie not in self.used, "a cookie twice"
        self.used.add(cookie)
        left = session.credentials.cookies
        assert cookie not in left
        cookies = (*left, *fresh_cookies(new))
        match outcome:
            case "answer" | "wrong time":
                time = INSIDE if outcome == "answer" else AFTER + 1
                checked = used.unchecked > 0
                assert session.answered(cookies, time) == (outcome == "answer" or not checked)
                if outcome == "answer" or not checked:
                    if self.was_good:
                        self.attempts, self.minimum = 0, MIN_RETRY
                else:
                    assert session.credentials is None
                self.in_vain = self.spare = 0
            case "silence" | "nak":
                session.unanswered(self.now, is_nak=outcome == "nak")
                # Where another address is left, one silence before any answer says as much as two.
                self.in_vain += 2 if outcome == "silence" and self.spare else 1
            case "unsent":
                session.unsent(self.now)
            case kiss:
                session.kissed(kiss, cookies, self.now)
                self.in_vain = self.spare = 0
                if kiss == "RATE":
                    assert session.rate_floor >= min(2 * self.rate, MAX_INTERVAL)
                    self.rate = session.rate_floor
                self.stopped = kiss == "DENY"

    @invariant()
    def a_session_always_knows_what_to_do(self):
        action = self.session.next(self.now)
        assert isinstance(action, Stop) == self.stopped
        if isinstance(action, PollAt):
            assert self.session.credentials.cookies
        if self.session.credentials is not None:
            assert len(self.session.credentials.cookies) <= 8


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
