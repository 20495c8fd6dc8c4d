//! What an NTP server answers to datagrams (RFC 5905, RFC 8915 section 5.7), by the rules of `nts_core.server`.
//!
//! Requests are worked on `LANES` at a time: what their ciphers have to do is done side by side (see `siv`). The
//! steps are those that one request takes; whatever leaves the common path is finished at once.

use arrayvec::ArrayVec;

use crate::aead::{self, Aead, text_in};
use crate::cookies::{self, Keyring, MAX_COOKIES, Recognised, Role};
use crate::labels::labelled;
use crate::ntptime;
use crate::packet::{
    AUTHENTICATOR, Asked, Authenticator, CLIENT, COOKIE, COOKIE_PLACEHOLDER, ClockState, Field, Fields, HEADER,
    MAX_DATAGRAM, MIN_FIELD, MIN_HIDDEN_FIELD, Malformed, UNIQUE_IDENTIFIER, has_legacy_mac,
};
use crate::siv::{self, TAG};

/// How many requests are worked on side by side.
pub const LANES: usize = siv::LANES;
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

labelled! {
    /// What became of a datagram; the label of a counter.
    pub enum Outcome {
        Time => "time",
        NtsTime => "nts-time",
        Ntsn => "ntsn",
        KissRate => "kiss-rate",
        KissDeny => "kiss-deny",
        Malformed => "malformed",
        Mode => "mode",
        Version => "version",
        LegacyMac => "legacy-mac",
        IncompleteNts => "incomplete-nts",
        TooShortForAnswer => "too-short-for-answer",
    }
}

/// A datagram that came, when it came (Unix nanoseconds to be served), and the kiss (RATE or DENY) that it is to get instead
/// of the time.
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
}

/// The place of an answer among those that leave with it, which are all of its kind: `answers`, of which so many are
/// `ahead` of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub ahead: usize,
    pub answers: usize,
    /// Whether they are still to be sealed.
    pub is_nts: bool,
}

/// What the world gives and takes: randomness, the time, and answers.
pub trait World {
    /// Fill `room` for the request at this place of the batch: nonces.
    fn random(&mut self, lane: usize, room: &mut [u8]);
    /// How many answers may leave together: one or more, and no more than `LANES`.
    fn together(&self) -> usize;
    /// When an answer will leave, in Unix nanoseconds to be served; asked as late as can be.
    fn departure(&mut self, place: Place) -> i64;
    /// Answers that are ready, each with its lane: those of one group in the order of their places, or all refusals.
    /// Each reply with octets leaves once.
    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>);
}

/// Answer up to `LANES` requests, each in the reply at its place. First leaves what tells a time, or would have (`Kiss`),
/// as many together as the world wants; NTS NAKs leave last.
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
    let mut batch = Batch { keyring, clock, plain: ArrayVec::new(), nts: ArrayVec::new() };
    for (lane, (request, reply)) in requests.iter().zip(&mut *replies).enumerate() {
        batch.take(lane, request, reply);
    }
    batch.open_cookies();
    batch.verify();
    batch.seal_cookies(world);
    batch.answer(world);
    let refused = replies[..requests.len()].iter().enumerate().filter(|(_, reply)| reply.outcome == Outcome::Ntsn);
    world.leave(refused);
}

/// What goes on together: all that is left of the requests in each of its steps.
struct Batch<'a> {
    keyring: &'a Keyring,
    clock: &'a ClockState,
    plain: ArrayVec<Exchange<'a>, LANES>,
    nts: ArrayVec<Nts<'a>, LANES>,
}

impl<'a> Batch<'a> {
    /// Read one request. What neither asks for plain time nor may be authentic has its reply then.
    fn take(&mut self, lane: usize, request: &'a Request<'a>, reply: &'a mut Reply) {
        reply.opened = None;
        reply.sealed = 0;
        let datagram = request.datagram;
        let read = match read(datagram) {
            Ok(read) => read,
            Err(why) => return reply.drop(why),
        };
        let echo = read.identifier.as_ref().map_or(&[][..], |field| &datagram[field.whole()]);
        let mut exchange = Exchange { lane, request, asked: read.asked, echo, reply };
        let (field, cookie) = match (&read.authenticator, &read.cookie) {
            (None, None) => return self.plain.push(exchange),
            (Some(field), Some(cookie)) if read.is_complete_nts() => (field, cookie),
            _ => return exchange.reply.drop(Outcome::IncompleteNts),
        };
        let Ok(authenticator) = Authenticator::read(datagram, field) else {
            return exchange.reply.drop(Outcome::Malformed);
        };
        let Some(cookie) = self.keyring.recognise(&datagram[cookie.value()]) else { return exchange.refuse() };
        let (protected, answer) = (&datagram[..field.start], Layout::default());
        self.nts.push(Nts { exchange, authenticator, protected, cookie, is_authentic: false, answer });
    }

    fn open_cookies(&mut self) {
        let mut jobs = ArrayVec::<_, LANES>::new();
        jobs.extend(self.nts.iter_mut().map(Nts::opening));
        siv::open(&mut jobs);
        drop(jobs);
        self.nts.retain(|nts| {
            if !nts.is_authentic {
                nts.exchange.refuse();
                return false;
            }
            let leaves_room = nts.authenticator.leaves_room(nts.cookie.keys.aead.nonce_length());
            if !leaves_room {
                nts.exchange.reply.drop(Outcome::Malformed);
            }
            leaves_room
        });
    }

    fn verify(&mut self) {
        let mut keys = ArrayVec::new();
        Aead::of_packets(&mut keys, self.nts.iter().map(|nts| (nts.cookie.keys.aead, nts.cookie.keys.c2s())));
        aead::open(self.nts.iter_mut().zip(&keys).map(|(nts, aead)| nts.hidden(aead)));
        self.nts.retain(|nts| {
            if !nts.is_authentic {
                nts.exchange.refuse();
                return false;
            }
            let Ok(wanted) = nts.wanted() else {
                nts.exchange.reply.drop(Outcome::Malformed);
                return false;
            };
            nts.exchange.reply.opened = Some(nts.cookie.role);
            nts.answer = Layout::of(nts, wanted);
            if nts.answer.cookies == 0 {
                nts.exchange.reply.drop(Outcome::TooShortForAnswer);
            }
            nts.answer.cookies > 0
        });
    }

    fn seal_cookies(&mut self, world: &mut impl World) {
        let mut jobs = ArrayVec::<_, { LANES * MAX_COOKIES }>::new();
        for nts in &mut self.nts {
            nts.lay_out(self.keyring, world, &mut jobs);
        }
        siv::seal(&mut jobs);
    }

    /// What is left depends on the time, which is taken as late as can be.
    fn answer(mut self, world: &mut impl World) {
        let mut keys = ArrayVec::new();
        Aead::of_packets(&mut keys, self.nts.iter().map(|nts| (nts.cookie.keys.aead, nts.cookie.keys.s2c())));
        let together = world.together();
        for (group, keys) in self.nts.chunks_mut(together).zip(keys.chunks(together)) {
            let answers = group.len();
            for (ahead, nts) in group.iter_mut().enumerate() {
                nts.exchange.head(self.clock, Place { ahead, answers, is_nts: true }, world);
            }
            aead::seal(group.iter_mut().zip(keys).map(|(nts, aead)| nts.sealing(aead)));
            world.leave(group.iter().map(|nts| nts.exchange.answer()));
        }
        for group in self.plain.chunks_mut(together) {
            let answers = group.len();
            for (ahead, exchange) in group.iter_mut().enumerate() {
                exchange.head(self.clock, Place { ahead, answers, is_nts: false }, world);
                exchange.clear(exchange.outcome(Outcome::Time));
            }
            world.leave(group.iter().map(Exchange::answer));
        }
    }
}

/// A request that has a form, and the reply to it.
struct Exchange<'a> {
    lane: usize,
    request: &'a Request<'a>,
    asked: Asked,
    /// The first unique identifier as it came. It protects even plain NTP from spoofing off the path.
    echo: &'a [u8],
    reply: &'a mut Reply,
}

impl Exchange<'_> {
    /// What becomes of it when nothing is wrong with it.
    fn outcome(&self, usual: Outcome) -> Outcome {
        self.request.kiss.map_or(usual, Kiss::outcome)
    }

    fn head(&mut self, clock: &ClockState, place: Place, world: &mut impl World) {
        if let Some(kiss) = self.request.kiss {
            return self.kiss(kiss);
        }
        let received = stamp(self.request.received);
        let transmit = stamp(world.departure(place));
        clock.answer(&self.asked, received, transmit, &mut self.reply.octets);
    }

    /// All times of a kiss-o'-death packet are the request's own.
    fn kiss(&mut self, code: Kiss) {
        code.state().answer(&self.asked, self.asked.transmit, self.asked.transmit, &mut self.reply.octets);
    }

    /// NTS NAK: protected by nothing, and only the identifier tells whom it answers (section 5.7).
    fn refuse(&mut self) {
        self.kiss(Kiss::Ntsn);
        self.clear(Outcome::Ntsn);
    }

    fn answer(&self) -> (usize, &Reply) {
        (self.lane, self.reply)
    }

    /// Behind the header, the identifier and nothing more.
    fn clear(&mut self, outcome: Outcome) {
        let length = HEADER + self.echo.len();
        self.reply.octets[HEADER..length].copy_from_slice(self.echo);
        self.reply.length = length;
        self.reply.outcome = outcome;
    }
}

/// An NTS request on its way.
struct Nts<'a> {
    exchange: Exchange<'a>,
    authenticator: Authenticator,
    /// All before the authenticator.
    protected: &'a [u8],
    cookie: Recognised<'a>,
    /// What the last step found.
    is_authentic: bool,
    answer: Layout,
}

impl Nts<'_> {
    /// Octets of its cookie, and of each new one.
    fn cookie_length(&self) -> usize {
        cookies::length(self.cookie.keys.aead)
    }

    /// The work to open its cookie.
    fn opening(&mut self) -> siv::Opening<'_> {
        self.cookie.opening(&mut self.is_authentic)
    }

    /// The work to verify it. Hidden fields are decrypted where the answer will be.
    fn hidden<'b>(&'b mut self, aead: &'b Aead) -> (aead::Work<'b>, &'b mut bool) {
        let datagram = self.exchange.request.datagram;
        let ciphertext = &datagram[self.authenticator.ciphertext.clone()];
        let sealed = &mut self.exchange.reply.octets[..ciphertext.len()];
        sealed.copy_from_slice(ciphertext);
        let nonce = &datagram[self.authenticator.nonce.clone()];
        (aead::Work { aead, nonce, data: self.protected, sealed }, &mut self.is_authentic)
    }

    /// How many cookies it asks for. Placeholders of another length than the cookie do not count: section 5.5 demands
    /// the same length, and only that keeps the answer from being longer.
    fn wanted(&self) -> Result<usize, Malformed> {
        let hidden = text_in(self.cookie.keys.aead, self.authenticator.ciphertext.len());
        let hidden = Fields::new(&self.exchange.reply.octets[hidden], 0, MIN_HIDDEN_FIELD);
        let mut wanted = 1;
        for place in Fields::new(self.protected, HEADER, MIN_FIELD).chain(hidden) {
            let place = place?;
            wanted += usize::from(place.kind == COOKIE_PLACEHOLDER && place.value().len() == self.cookie_length());
        }
        Ok(wanted)
    }

    /// Write the answer but for its header, and add the work to seal its cookies.
    fn lay_out<'b, const N: usize>(
        &'b mut self,
        keyring: &'b Keyring,
        world: &mut impl World,
        jobs: &mut ArrayVec<siv::Sealing<'b>, N>,
    ) {
        let Layout { nonce, body, length, cookies, .. } = self.answer;
        let (outcome, each) = (self.exchange.outcome(Outcome::NtsTime), 4 + self.cookie_length());
        let reply = &mut *self.exchange.reply;
        (reply.length, reply.sealed) = (length, cookies);
        reply.outcome = outcome;
        let mut random = [0; MOST_RANDOM];
        let random = &mut random[..body - nonce + cookies * cookies::NONCE];
        world.random(self.exchange.lane, random);
        let (drawn, nonces) = random.split_at(body - nonce);

        let octets = &mut reply.octets[..length];
        let field = nonce - 8;
        octets[HEADER..field].copy_from_slice(self.exchange.echo);
        octets[field..field + 2].copy_from_slice(&AUTHENTICATOR.to_be_bytes());
        octets[field + 2..field + 4].copy_from_slice(&short(length - field));
        octets[field + 4..field + 6].copy_from_slice(&short(drawn.len()));
        octets[field + 6..nonce].copy_from_slice(&short(length - body));
        octets[nonce..body].copy_from_slice(drawn);
        let text = &mut octets[body..][text_in(self.cookie.keys.aead, length - body)];
        for (place, nonce) in text.chunks_exact_mut(each).zip(nonces.as_chunks().0) {
            place[0..2].copy_from_slice(&COOKIE.to_be_bytes());
            place[2..4].copy_from_slice(&short(each));
            jobs.push(keyring.sealing(&self.cookie.keys, nonce, &mut place[4..]));
        }
    }

    /// The work to seal the answer, once its header is there.
    fn sealing<'b>(&'b mut self, aead: &'b Aead) -> aead::Work<'b> {
        let Layout { nonce, body, length, .. } = self.answer;
        let (clear, sealed) = self.exchange.reply.octets[..length].split_at_mut(body);
        aead::Work { aead, nonce: &clear[nonce..], data: &clear[..nonce - 8], sealed }
    }
}

/// Where the parts of an authentic answer are: header and identifier, the authenticator's 8 octets of lengths, from
/// `nonce` on its nonce, from `body` on what is sealed.
#[derive(Clone, Copy, Default)]
struct Layout {
    cookies: usize,
    nonce: usize,
    body: usize,
    length: usize,
}

impl Layout {
    /// With as many cookies as are wanted and fit: no answer is longer than its request.
    fn of(nts: &Nts, wanted: usize) -> Self {
        let nonce = HEADER + nts.exchange.echo.len() + 8;
        let body = nonce + nts.cookie.keys.aead.nonce_length();
        let each = 4 + nts.cookie_length();
        let room = nts.exchange.request.datagram.len().saturating_sub(body + TAG) / each;
        let cookies = wanted.min(MAX_COOKIES).min(room);
        Self { cookies, nonce, body, length: body + TAG + cookies * each }
    }
}

fn stamp(unix_ns: i64) -> [u8; 8] {
    ntptime::timestamp(unix_ns).to_be_bytes()
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

impl Read {
    fn is_complete_nts(&self) -> bool {
        let identifier = self.identifier.as_ref().map_or(0, |field| field.value().len());
        let has_one_each = self.cookies == 1 && self.identifiers == 1;
        self.asked.version == 4 && has_one_each && identifier >= MIN_UNIQUE_IDENTIFIER
    }
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

#[cfg(test)]
mod tests;
