//! What an NTP server answers to datagrams (RFC 5905, RFC 8915 section 5.7), by the rules of `nts_core.server`.
//!
//! Requests are worked on `LANES` at a time: what their ciphers have to do is done side by side (see `siv`). The
//! steps are those that one request takes; whatever leaves the common path is finished at once.

use crate::aead::{Aead, SessionKeys, text_in};
use crate::cookies::{self, Keyring, MAX_COOKIES, Role};
use crate::ntptime;
use crate::packet::{
    AUTHENTICATOR, Asked, Authenticator, CLIENT, COOKIE, COOKIE_PLACEHOLDER, ClockState, Field, Fields, HEADER,
    MAX_DATAGRAM, MIN_FIELD, MIN_HIDDEN_FIELD, Malformed, UNIQUE_IDENTIFIER, has_legacy_mac,
};
use crate::siv::TAG;

/// How many requests are worked on side by side.
pub const LANES: usize = 8;
/// Section 5.3 asks for 32 octets.
const MIN_UNIQUE_IDENTIFIER: usize = 32;
/// Octets of randomness that one answer takes at most: its nonce, and one for each cookie.
pub const MOST_RANDOM: usize = 16 + MAX_COOKIES * cookies::NONCE;

/// Kiss codes that a server may answer with instead of the time (RFC 5905 section 7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kiss {
    Rate,
    Deny,
    Ntsn,
}

impl Kiss {
    fn state(self) -> ClockState {
        ClockState::kiss(*match self {
            Self::Rate => b"RATE",
            Self::Deny => b"DENY",
            Self::Ntsn => b"NTSN",
        })
    }

    fn outcome(self) -> Outcome {
        match self {
            Self::Rate => Outcome::KissRate,
            Self::Deny => Outcome::KissDeny,
            Self::Ntsn => Outcome::Ntsn,
        }
    }
}

/// What became of a datagram; the label of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Outcome {
    Time,
    NtsTime,
    Ntsn,
    KissRate,
    KissDeny,
    Malformed,
    Mode,
    Version,
    LegacyMac,
    IncompleteNts,
    TooShortForAnswer,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Time,
        Self::NtsTime,
        Self::Ntsn,
        Self::KissRate,
        Self::KissDeny,
        Self::Malformed,
        Self::Mode,
        Self::Version,
        Self::LegacyMac,
        Self::IncompleteNts,
        Self::TooShortForAnswer,
    ];

    /// The label, as the Python engine has it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::NtsTime => "nts-time",
            Self::Ntsn => "ntsn",
            Self::KissRate => "kiss-rate",
            Self::KissDeny => "kiss-deny",
            Self::Malformed => "malformed",
            Self::Mode => "mode",
            Self::Version => "version",
            Self::LegacyMac => "legacy-mac",
            Self::IncompleteNts => "incomplete-nts",
            Self::TooShortForAnswer => "too-short-for-answer",
        }
    }
}

/// A datagram that came, when it came (Unix nanoseconds to be served), and what it is to get instead of the time.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub datagram: &'a [u8],
    pub received: i64,
    pub kiss: Option<Kiss>,
}

/// The answer to one request: its first `length` octets are to be sent, unless there are none.
pub struct Reply {
    pub octets: [u8; MAX_DATAGRAM],
    pub length: usize,
    pub outcome: Outcome,
    /// Of an authentic request, the role of the key that opened its cookie.
    pub opened: Option<Role>,
    /// How many cookies it brings.
    pub sealed: usize,
}

impl Default for Reply {
    fn default() -> Self {
        Self { octets: [0; MAX_DATAGRAM], length: 0, outcome: Outcome::Malformed, opened: None, sealed: 0 }
    }
}

impl Reply {
    fn drop(&mut self, why: Outcome) {
        self.length = 0;
        self.outcome = why;
    }

    /// A header, and behind it the client's unique identifier as it came.
    fn clear(&mut self, outcome: Outcome, echo: &[u8]) {
        self.octets[HEADER..HEADER + echo.len()].copy_from_slice(echo);
        self.length = HEADER + echo.len();
        self.outcome = outcome;
    }
}

/// What the world gives: the time when it is asked, and randomness for one lane.
pub trait World {
    /// Unix nanoseconds to be served, as late as can be.
    fn now(&mut self) -> i64;
    /// Fill `room` for the request at this place of the batch: nonces.
    fn random(&mut self, lane: usize, room: &mut [u8]);
}

/// An NTS request, up to the point that it has come to.
struct Nts {
    lane: usize,
    asked: Asked,
    echo: std::ops::Range<usize>,
    cookie: std::ops::Range<usize>,
    authenticator: Authenticator,
    /// Where the authenticator begins: all before it is associated data.
    protected: usize,
    keys: SessionKeys,
    role: Role,
    wanted: usize,
}

/// Answer up to `LANES` requests, each in the reply at its place.
///
/// # Panics
/// When there are more requests than lanes or replies.
pub fn respond(
    keyring: &Keyring,
    clock: &ClockState,
    requests: &[Request],
    replies: &mut [Reply],
    world: &mut impl World,
) {
    assert!(requests.len() <= LANES && requests.len() <= replies.len(), "more requests than lanes");
    for (lane, request) in requests.iter().enumerate() {
        let reply = &mut replies[lane];
        reply.opened = None;
        reply.sealed = 0;
        if let Some(nts) = begin(keyring, clock, request, lane, reply, world) {
            finish(keyring, clock, request, &nts, reply, world);
        }
    }
}

fn stamp(unix_ns: i64) -> [u8; 8] {
    ntptime::timestamp(unix_ns).to_be_bytes()
}

fn head(clock: &ClockState, request: &Request, asked: &Asked, reply: &mut Reply, world: &mut impl World) {
    match request.kiss {
        // All times of a kiss-o'-death packet are the request's own.
        Some(kiss) => kiss.state().answer(asked, asked.transmit, asked.transmit, &mut reply.octets),
        None => clock.answer(asked, stamp(request.received), stamp(world.now()), &mut reply.octets),
    }
}

/// Everything up to the authentic request of an NTS client, which is left to be answered.
fn begin(
    keyring: &Keyring,
    clock: &ClockState,
    request: &Request,
    lane: usize,
    reply: &mut Reply,
    world: &mut impl World,
) -> Option<Nts> {
    let datagram = request.datagram;
    let read = match read(datagram) {
        Ok(read) => read,
        Err(why) => {
            reply.drop(why);
            return None;
        }
    };
    let echo = read.identifier.as_ref().map_or(0..0, Field::whole);
    if read.authenticator.is_none() && read.cookies == 0 {
        head(clock, request, &read.asked, reply, world);
        reply.clear(request.kiss.map_or(Outcome::Time, Kiss::outcome), &datagram[echo]);
        return None;
    }
    match verify(keyring, datagram, &read) {
        Ok((keys, role, wanted, authenticator, protected, cookie)) => {
            reply.opened = Some(role);
            Some(Nts { lane, asked: read.asked, echo, cookie, authenticator, protected, keys, role, wanted })
        }
        Err(Refusal::Drop(why)) => {
            reply.drop(why);
            None
        }
        Err(Refusal::Nak) => {
            // NTS NAK: protected by nothing, and only the identifier tells whom it answers (section 5.7).
            Kiss::Ntsn.state().answer(&read.asked, read.asked.transmit, read.asked.transmit, &mut reply.octets);
            reply.clear(Outcome::Ntsn, &datagram[echo]);
            None
        }
    }
}

enum Refusal {
    Drop(Outcome),
    Nak,
}

impl From<Malformed> for Refusal {
    fn from(_: Malformed) -> Self {
        Self::Drop(Outcome::Malformed)
    }
}

type Verified = (SessionKeys, Role, usize, Authenticator, usize, std::ops::Range<usize>);

fn verify(keyring: &Keyring, datagram: &[u8], read: &Read) -> Result<Verified, Refusal> {
    let (Some(field), Some(identifier), Some(cookie)) = (&read.authenticator, &read.identifier, &read.cookie) else {
        return Err(Refusal::Drop(Outcome::IncompleteNts));
    };
    if read.asked.version != 4
        || read.cookies != 1
        || read.identifiers != 1
        || identifier.value().len() < MIN_UNIQUE_IDENTIFIER
    {
        return Err(Refusal::Drop(Outcome::IncompleteNts));
    }
    let authenticator = Authenticator::read(datagram, field)?;
    let (keys, role) = keyring.open(&datagram[cookie.value()]).ok_or(Refusal::Nak)?;
    if !authenticator.leaves_room(keys.aead.nonce_length()) {
        return Err(Malformed.into());
    }
    let aead = Aead::new(keys.aead, keys.c2s()).ok_or(Refusal::Nak)?;
    let mut hidden = [0; MAX_DATAGRAM];
    let hidden = &mut hidden[..authenticator.ciphertext.len()];
    hidden.copy_from_slice(&datagram[authenticator.ciphertext.clone()]);
    let plain =
        aead.open(&datagram[authenticator.nonce.clone()], &datagram[..field.start], hidden).ok_or(Refusal::Nak)?;
    // Placeholders of another length than the cookie do not count: section 5.5 demands the same length, and only that
    // keeps the answer from being longer.
    let mut wanted = 1;
    for place in
        Fields::new(&datagram[..field.start], HEADER, MIN_FIELD).chain(Fields::new(&hidden[plain], 0, MIN_HIDDEN_FIELD))
    {
        let place = place?;
        wanted += usize::from(place.kind == COOKIE_PLACEHOLDER && place.value().len() == cookie.value().len());
    }
    Ok((keys, role, wanted, authenticator, field.start, cookie.value()))
}

/// The authentic answer with as many cookies as are wanted and fit.
fn finish(
    keyring: &Keyring,
    clock: &ClockState,
    request: &Request,
    nts: &Nts,
    reply: &mut Reply,
    world: &mut impl World,
) {
    let algorithm = nts.keys.aead;
    let (nonce_length, cookie_length) = (algorithm.nonce_length(), cookies::length(algorithm));
    let fixed = HEADER + nts.echo.len() + Authenticator::length(nonce_length, 0);
    let room = request.datagram.len().saturating_sub(fixed) / (4 + cookie_length);
    let count = nts.wanted.min(MAX_COOKIES).min(room);
    if count == 0 {
        reply.drop(Outcome::TooShortForAnswer);
        return;
    }
    let mut random = [0; MOST_RANDOM];
    let random = &mut random[..nonce_length + count * cookies::NONCE];
    world.random(nts.lane, random);
    let (nonce, nonces) = random.split_at(nonce_length);

    let clear = HEADER + nts.echo.len();
    let sealed = TAG + count * (4 + cookie_length);
    let body = clear + 8 + nonce_length;
    let length = body + sealed;
    reply.octets[HEADER..clear].copy_from_slice(&request.datagram[nts.echo.clone()]);
    let field = &mut reply.octets[clear..body];
    field[0..2].copy_from_slice(&AUTHENTICATOR.to_be_bytes());
    field[2..4].copy_from_slice(&short(length - clear));
    field[4..6].copy_from_slice(&short(nonce_length));
    field[6..8].copy_from_slice(&short(sealed));
    field[8..].copy_from_slice(nonce);
    let text = &mut reply.octets[body..length][text_in(algorithm, sealed)];
    for (place, nonce) in text.chunks_exact_mut(4 + cookie_length).zip(nonces.as_chunks().0) {
        place[0..2].copy_from_slice(&COOKIE.to_be_bytes());
        place[2..4].copy_from_slice(&short(4 + cookie_length));
        keyring.seal(&nts.keys, nonce, &mut place[4..]);
    }
    let Some(aead) = Aead::new(algorithm, nts.keys.s2c()) else { return reply.drop(Outcome::Malformed) };
    head(clock, request, &nts.asked, reply, world);
    let (before, sealed) = reply.octets[..length].split_at_mut(body);
    aead.seal(nonce, &before[..clear], sealed);
    reply.length = length;
    reply.outcome = request.kiss.map_or(Outcome::NtsTime, Kiss::outcome);
    reply.sealed = count;
}

/// A length on the wire; no datagram is longer than its 16 bits.
#[allow(clippy::cast_possible_truncation)]
fn short(length: usize) -> [u8; 2] {
    (length as u16).to_be_bytes()
}

/// What a datagram asks for.
struct Read {
    asked: Asked,
    identifier: Option<Field>,
    identifiers: usize,
    cookie: Option<Field>,
    cookies: usize,
    authenticator: Option<Field>,
}

/// One pass over a datagram.
fn read(datagram: &[u8]) -> Result<Read, Outcome> {
    if datagram.len() < HEADER || datagram.len() > MAX_DATAGRAM {
        return Err(Outcome::Malformed);
    }
    if datagram[0] & 7 != CLIENT {
        return Err(Outcome::Mode);
    }
    let version = datagram[0] >> 3 & 7;
    if version != 3 && version != 4 {
        return Err(Outcome::Version);
    }
    if has_legacy_mac(datagram.len()) {
        return Err(Outcome::LegacyMac);
    }
    let mut transmit = [0; 8];
    transmit.copy_from_slice(&datagram[40..48]);
    let asked = Asked { version, poll: datagram[2], transmit };
    let mut read = Read { asked, identifier: None, identifiers: 0, cookie: None, cookies: 0, authenticator: None };
    for field in Fields::new(datagram, HEADER, MIN_FIELD) {
        let field = field.map_err(|Malformed| Outcome::Malformed)?;
        match field.kind {
            UNIQUE_IDENTIFIER => {
                read.identifiers += 1;
                read.identifier.get_or_insert(field);
            }
            COOKIE => {
                read.cookies += 1;
                read.cookie.get_or_insert(field);
            }
            AUTHENTICATOR => read.authenticator = Some(field),
            _ => {}
        }
    }
    Ok(read)
}
