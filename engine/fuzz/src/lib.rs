//! What the fuzz targets do with an input, and what holds for every input: they panic where that does not hold, and else
//! return one word for what became of it.
//!
//! Inputs have the form that the Python targets of the same purpose have (`fuzz/`), so that both share one corpus; and
//! `engine/tests/corpus.rs` runs it through these functions without libFuzzer. No fuzzer guesses a tag of 128 bits:
//! `packet` takes a datagram in its null form as well, in which cookies and ciphertexts are any octets of the right
//! length, and seals it with the true key. It is sealed and opened by the crate `aes-siv`, not by our own.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, LazyLock};

use aes_gcm_siv::aead::{Aead as _, Payload};
use aes_gcm_siv::{Aes128GcmSiv, Nonce};
use aes_siv::KeyInit;
use aes_siv::siv::CmacSiv;
use nts_engine::access::Prefix;
use nts_engine::admission::{Limits, Verdict};
use nts_engine::aead::{AeadId, SessionKeys};
use nts_engine::cookies::{self, Keyring, MAX_COOKIES, Role};
use nts_engine::ke::{self, KeReply, KeServer, KeTerms, NoKeys, NtpEndpoint, NtpService, Session};
use nts_engine::packet::{
    AUTHENTICATOR, Authenticator, COOKIE, COOKIE_PLACEHOLDER, ClockState, Field, Fields, HEADER, MIN_FIELD,
    MIN_HIDDEN_FIELD, UNIQUE_IDENTIFIER, padded,
};
use nts_engine::records::{self, MessageReader};
use nts_engine::server::{self, Kiss, LANES, Outcome, Place, Reply, Request, World};

const ALGORITHMS: [AeadId; 4] = [AeadId::SivCmac256, AeadId::SivCmac384, AeadId::SivCmac512, AeadId::Aes128GcmSiv];
const KISSES: [Option<Kiss>; 3] = [None, Some(Kiss::Rate), Some(Kiss::Deny)];
/// 2023-11-14, in Unix nanoseconds.
const NOW: i64 = 1_700_000_000_000_000_000;
const TAG: usize = 16;

static KEYRING: LazyLock<Arc<Keyring>> = LazyLock::new(|| {
    let keys: Vec<_> = [8, 7, 6].map(|number| (u16::from(number), [number; 32])).into();
    Keyring::new(&keys).expect("three keys").into()
});
static SESSIONS: LazyLock<[SessionKeys; 4]> = LazyLock::new(|| {
    ALGORITHMS.map(|aead| {
        let both: Vec<u8> = (0..2 * aead.key_length()).map(|place| place.to_le_bytes()[0]).collect();
        SessionKeys::new(aead, &both).expect("both keys")
    })
});
const CLOCK: ClockState = ClockState {
    leap: 0,
    stratum: 2,
    precision: -20,
    root_delay: 655,
    root_dispersion: 66,
    reference_id: *b"FUZZ",
    reference: 1,
};

/// A time that stands still, and nonces of which no two are the same; `first` is the lane of the first request.
struct Still {
    first: usize,
    together: usize,
    /// Octets that have left, by lane.
    left: [Vec<u8>; LANES],
}

impl World for Still {
    fn departure(&mut self, _place: Place) -> i64 {
        NOW
    }

    fn together(&self) -> usize {
        self.together
    }

    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>) {
        for (lane, reply) in answers {
            self.left[lane].extend(&reply.octets[..reply.length]);
        }
    }

    fn random(&mut self, lane: usize, room: &mut [u8]) {
        assert!(room.len() <= server::MOST_RANDOM, "work is bounded: no more is drawn than eight cookies need");
        for (place, octet) in room.iter_mut().enumerate() {
            *octet = place.wrapping_mul(7).wrapping_add(self.first + lane).to_le_bytes()[0];
        }
    }
}

/// One datagram, the kiss it is to get, and the keys of who sealed it.
#[derive(Clone)]
struct Asking<'a> {
    datagram: Vec<u8>,
    kiss: Option<Kiss>,
    keys: Option<&'a SessionKeys>,
}

/// A datagram as it is and in its null form, answered side by side and alone. First octet: the algorithm in its two
/// lowest bits, and above them the kiss that is asked for; its three highest tell how many leave together.
pub fn packet(data: &[u8]) -> &'static str {
    let (&choice, datagram) = data.split_first().unwrap_or((&0, &[]));
    let sealed = |number: usize, kiss: usize| {
        let keys = &SESSIONS[number % 4];
        Asking { datagram: sealed(datagram, keys), kiss: KISSES[kiss % 3], keys: Some(keys) }
    };
    let (number, kiss) = (usize::from(choice) % 4, usize::from(choice) / 4);
    let raw = |kiss: usize| Asking { datagram: datagram.to_vec(), kiss: KISSES[kiss % 3], keys: None };
    let all: [Asking; LANES] = [
        sealed(number, kiss),
        raw(kiss),
        sealed(number + 1, kiss),
        sealed(number, kiss + 1),
        raw(kiss + 1),
        sealed(number + 2, kiss + 2),
        sealed(number + 3, kiss),
        sealed(number, kiss),
    ];
    let mut together: Vec<Reply> = all.iter().map(|_| Reply::default()).collect();
    answer(&all, 0, 1 + usize::from(choice >> 5), &mut together);
    for (lane, (asking, reply)) in all.iter().zip(&together).enumerate() {
        let mut alone = [Reply::default()];
        answer(std::slice::from_ref(asking), lane, 1, &mut alone);
        let [alone] = alone;
        assert_eq!(
            (alone.outcome, alone.opened, alone.sealed, &alone.octets[..alone.length]),
            (reply.outcome, reply.opened, reply.sealed, &reply.octets[..reply.length]),
            "an answer does not depend on what it is answered with"
        );
        check_reply(asking, reply);
    }
    together[0].outcome.label()
}

fn answer(all: &[Asking], first: usize, together: usize, replies: &mut [Reply]) {
    let requests: Vec<_> =
        all.iter().map(|asking| Request { datagram: &asking.datagram, received: NOW, kiss: asking.kiss }).collect();
    let mut world = Still { first, together, left: Default::default() };
    server::respond(&KEYRING, &CLOCK, &requests, replies, &mut world);
    for (reply, left) in replies.iter().zip(&world.left) {
        assert_eq!(reply.octets[..reply.length], *left, "what is in the reply has left, once");
    }
}

fn check_reply(asking: &Asking, reply: &Reply) {
    let (datagram, told) = (&asking.datagram, &reply.octets[..reply.length]);
    let is_answer = matches!(
        reply.outcome,
        Outcome::Time | Outcome::NtsTime | Outcome::Ntsn | Outcome::KissRate | Outcome::KissDeny
    );
    assert_eq!(is_answer, !told.is_empty(), "answers have octets, and nothing else has");
    assert!(told.len() <= datagram.len(), "a reply is never longer than its request");
    assert!(reply.sealed == 0 || reply.opened.is_some(), "cookies are for who has shown one");
    if told.is_empty() {
        return;
    }
    assert_eq!(datagram[0] & 7, 3, "nothing is answered but mode 3");
    assert_eq!(told[0] & 0x3F, datagram[0] & 0x38 | 4, "in kind, and of mode 4");
    assert_eq!(told[24..32], datagram[40..48], "a reply names the request's transmit time");
    let code = match (reply.outcome, asking.kiss) {
        (Outcome::Ntsn, _) => b"NTSN",
        (_, Some(Kiss::Rate)) => b"RATE",
        (_, Some(Kiss::Deny)) => b"DENY",
        _ => &CLOCK.reference_id,
    };
    assert_eq!(&told[12..16], code, "a kiss is given exactly when one is due");
    let (clear, authenticator) = fields(told, HEADER, MIN_FIELD);
    let echo = fields(datagram, HEADER, MIN_FIELD).0.into_iter().find(|field| field.kind == UNIQUE_IDENTIFIER);
    assert_eq!(
        clear.iter().map(|field| &told[field.whole()]).collect::<Vec<_>>(),
        echo.iter().map(|field| &datagram[field.whole()]).collect::<Vec<_>>(),
        "nothing is in clear but the unique identifier, as it came"
    );
    let Some(field) = authenticator else {
        assert!(reply.opened.is_none() && reply.outcome != Outcome::NtsTime, "who is authentic gets what is");
        return;
    };
    let keys = asking.keys.expect("nobody is authentic without the key");
    check_cookies(told, &field, keys, reply);
}

/// The cookies of an authentic answer.
fn check_cookies(told: &[u8], field: &Field, keys: &SessionKeys, reply: &Reply) {
    assert_eq!(reply.opened, Some(Role::Sealing), "they were sealed by the key that seals");
    let body = Authenticator::read(told, field).expect("a true authenticator");
    let plain = open(keys.aead, keys.s2c(), &told[body.nonce], &told[..field.start], &told[body.ciphertext]);
    let plain = plain.expect("an answer is authentic");
    let (given, none) = fields(&plain, 0, MIN_HIDDEN_FIELD);
    assert!(none.is_none() && given.iter().all(|field| field.kind == COOKIE), "nothing is hidden but cookies");
    assert_eq!(given.len(), reply.sealed);
    assert!((1..=MAX_COOKIES).contains(&given.len()), "one to eight cookies");
    let distinct: HashSet<_> = given.iter().map(|field| &plain[field.value()]).collect();
    assert_eq!(distinct.len(), given.len(), "no two cookies are the same");
    for cookie in distinct {
        assert_eq!(cookie.len(), cookies::length(keys.aead));
        let (held, role) = KEYRING.open(cookie).expect("a cookie of ours");
        assert_eq!((held.aead, held.both(), role), (keys.aead, keys.both(), Role::Sealing));
    }
}

/// The fields of octets that are well-formed so far, and the authenticator behind them.
fn fields(octets: &[u8], start: usize, shortest: usize) -> (Vec<Field>, Option<Field>) {
    if octets.len() < start {
        return (Vec::new(), None);
    }
    let mut found: Vec<_> = Fields::new(octets, start, shortest).map_while(Result::ok).collect();
    let authenticator = found.pop_if(|last| last.kind == AUTHENTICATOR);
    (found, authenticator)
}

/// A datagram of the null form with true cookies and a true authenticator; all lengths but those of cookies stay.
fn sealed(datagram: &[u8], keys: &SessionKeys) -> Vec<u8> {
    let (clear, authenticator) = fields(datagram, HEADER, MIN_FIELD);
    let Some(field) = authenticator else { return datagram.to_vec() };
    let mut made = datagram[..HEADER].to_vec();
    for field in clear {
        if field.kind == COOKIE {
            let mut cookie = [0; cookies::LONGEST];
            let cookie = &mut cookie[..cookies::length(keys.aead)];
            KEYRING.seal(keys, b"a nonce of 16...", cookie);
            push(&mut made, COOKIE, cookie);
        } else if field.kind == COOKIE_PLACEHOLDER && field.value().len() >= 100 {
            // Placeholders of a length that a cookie of the corpus has.
            push(&mut made, COOKIE_PLACEHOLDER, &vec![0; cookies::length(keys.aead)]);
        } else {
            made.extend_from_slice(&datagram[field.whole()]);
        }
    }
    let body = Authenticator::read(datagram, &field).ok().filter(|body| body.ciphertext.len() >= TAG);
    let Some(body) = body else {
        made.extend_from_slice(&datagram[field.start..]);
        return made;
    };
    let plain = &datagram[body.ciphertext.start + TAG..body.ciphertext.end];
    // Nobody can seal with a nonce of a length that the algorithm does not have.
    let ciphertext = seal(keys.aead, keys.c2s(), &datagram[body.nonce.clone()], &made, plain)
        .unwrap_or_else(|| datagram[body.ciphertext.clone()].to_vec());
    made.extend_from_slice(&datagram[field.start..body.ciphertext.start]);
    made.extend_from_slice(&ciphertext);
    made.extend_from_slice(&datagram[body.ciphertext.end..]);
    made
}

fn push(octets: &mut Vec<u8>, kind: u16, value: &[u8]) {
    octets.extend_from_slice(&kind.to_be_bytes());
    octets.extend_from_slice(&u16::try_from(4 + padded(value.len())).expect("a short field").to_be_bytes());
    octets.extend_from_slice(value);
}

fn seal(aead: AeadId, key: &[u8], nonce: &[u8], data: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    match aead {
        AeadId::SivCmac256 => CmacSiv::<aes::Aes128>::new_from_slice(key).ok()?.encrypt([data, nonce], text).ok(),
        AeadId::SivCmac384 => CmacSiv::<aes::Aes192>::new_from_slice(key).ok()?.encrypt([data, nonce], text).ok(),
        AeadId::SivCmac512 => CmacSiv::<aes::Aes256>::new_from_slice(key).ok()?.encrypt([data, nonce], text).ok(),
        AeadId::Aes128GcmSiv => {
            let nonce = Nonce::from(<[u8; 12]>::try_from(nonce).ok()?);
            Aes128GcmSiv::new_from_slice(key).ok()?.encrypt(&nonce, Payload { msg: text, aad: data }).ok()
        }
    }
}

fn open(aead: AeadId, key: &[u8], nonce: &[u8], data: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    match aead {
        AeadId::SivCmac256 => CmacSiv::<aes::Aes128>::new_from_slice(key).ok()?.decrypt([data, nonce], text).ok(),
        AeadId::SivCmac384 => CmacSiv::<aes::Aes192>::new_from_slice(key).ok()?.decrypt([data, nonce], text).ok(),
        AeadId::SivCmac512 => CmacSiv::<aes::Aes256>::new_from_slice(key).ok()?.decrypt([data, nonce], text).ok(),
        AeadId::Aes128GcmSiv => {
            let nonce = Nonce::from(<[u8; 12]>::try_from(nonce).ok()?);
            Aes128GcmSiv::new_from_slice(key).ok()?.decrypt(&nonce, Payload { msg: text, aad: data }).ok()
        }
    }
}

/// First octet: the algorithm; second: how many octets are cut off a true cookie; then what is changed of it, octet by
/// octet: more makes it longer.
pub fn cookies(data: &[u8]) -> &'static str {
    assert!(KEYRING.open(data).is_none(), "nobody makes a cookie without the key");
    let (choice, rest) = data.split_first().unwrap_or((&0, &[]));
    let (cut, mask) = rest.split_first().unwrap_or((&0, &[]));
    let keys = &SESSIONS[usize::from(*choice) % 4];
    let mut cookie = [0; cookies::LONGEST];
    let cookie = &mut cookie[..cookies::length(keys.aead)];
    KEYRING.seal(keys, b"a nonce of 16...", cookie);
    let mut shown = cookie[..cookie.len().saturating_sub((*cut).into())].to_vec();
    shown.resize(shown.len().max(mask.len()), 0);
    for (octet, change) in shown.iter_mut().zip(mask) {
        *octet ^= change;
    }
    let opened = KEYRING.open(&shown);
    assert_eq!(opened.is_some(), shown == cookie, "a cookie opens exactly when we made it");
    opened.map_or("refused", |(held, role)| {
        assert_eq!((held.aead, held.both(), role), (keys.aead, keys.both(), Role::Sealing));
        "opened"
    })
}

/// A TLS session whose keys are told by their context.
#[derive(Default)]
struct Told {
    drawn: usize,
}

fn exported(context: &[u8], key: &mut [u8]) {
    for (place, octet) in key.iter_mut().enumerate() {
        *octet = context[place % context.len()].wrapping_mul(31).wrapping_add(place.to_le_bytes()[0]);
    }
}

impl Session for Told {
    fn export(&mut self, context: &[u8], key: &mut [u8]) -> Result<(), NoKeys> {
        exported(context, key);
        Ok(())
    }

    fn random(&mut self, room: &mut [u8]) {
        for octet in room {
            *octet = self.drawn.to_le_bytes()[0];
            self.drawn += 1;
        }
    }
}

fn terms() -> KeTerms {
    let endpoint = |host: &str, port| NtpEndpoint { host: Some(host.to_owned()), port };
    KeTerms {
        keyring: KEYRING.clone(),
        service: NtpService {
            default: endpoint("ntp.example", 1123),
            others: vec![endpoint("192.0.2.1", 123), endpoint("2001:db8::1", 2123)],
        }
        .into(),
        preference: [AeadId::Aes128GcmSiv, AeadId::SivCmac256, AeadId::SivCmac512, AeadId::SivCmac384].into(),
    }
}

/// First octet: in pieces of how many octets the rest is fed (0: all at once).
pub fn ke(data: &[u8]) -> &'static str {
    let (&step, stream) = data.split_first().unwrap_or((&0, &[]));
    if let Ok(host) = ke::host_of(stream) {
        assert_eq!(ke::host_of(host.as_bytes()), Ok(host), "a host is written as it is read");
    }
    let (mut server, mut told, mut fed) = (KeServer::new(terms()), Told::default(), 0);
    let step = if step == 0 { stream.len().max(1) } else { step.into() };
    let reply = stream.chunks(step).find_map(|piece| {
        fed += piece.len();
        server.receive(piece, &mut told)
    });
    let Some(reply) = reply else { return "incomplete" };
    assert!(told.drawn <= MAX_COOKIES * cookies::NONCE, "no more is drawn than a nonce a cookie");
    let at_once = KeServer::new(terms()).receive(&stream[..fed], &mut Told::default()).expect("a whole request");
    assert_eq!((at_once.outcome, &at_once.octets), (reply.outcome, &reply.octets), "however it was cut");
    check_ke_reply(&stream[..fed], &reply);
    reply.outcome.label()
}

fn check_ke_reply(request: &[u8], reply: &KeReply) {
    let mut reader = MessageReader::new(65_536);
    let answer: Vec<_> = reader.receive(&reply.octets).expect("well-formed").expect("a whole message").collect();
    let given: Vec<_> = answer.iter().filter(|record| record.kind == records::NEW_COOKIE).collect();
    if answer.iter().any(|record| record.kind == records::ERROR) {
        assert_eq!(answer.len(), 1, "an Error record comes alone");
    }
    if reply.outcome != ke::Outcome::Ok {
        assert!(given.is_empty(), "who is refused gets no cookie");
        return;
    }
    let mut reader = MessageReader::new(records::MAX_REQUEST);
    let asked: Vec<_> = reader.receive(request).expect("well-formed").expect("a whole message").collect();
    let offered: Vec<_> = asked.iter().filter(|record| record.kind == records::AEAD_ALGORITHM).collect();
    let [high, low] = answer[1].body else { panic!("one algorithm is chosen") };
    assert!(offered[0].body.chunks(2).any(|pair| pair == [*high, *low]), "of those that were offered");
    let is_compliant = answer.iter().any(|record| record.kind == records::COMPLIANT_128GCM_EXPORT);
    let aead = AeadId::of((*low).into()).expect("an algorithm of ours");
    let named = if aead == AeadId::Aes128GcmSiv && !is_compliant { 15 } else { *low };
    let mut both = vec![0; 2 * aead.key_length()];
    for (direction, key) in (0..).zip(both.chunks_exact_mut(aead.key_length())) {
        exported(&[0, 0, 0, named, direction], key);
    }
    assert_eq!(given.iter().map(|cookie| cookie.body).collect::<HashSet<_>>().len(), MAX_COOKIES);
    for cookie in given {
        let (held, _) = KEYRING.open(cookie.body).expect("a cookie of ours");
        assert_eq!((held.aead, held.both()), (aead, both.as_slice()), "cookies hold the client's keys");
    }
}

/// First octets: interval (8), burst (4), the cap (2), what is told (1); then for each datagram an address (3) and a
/// pause (2).
pub fn ratelimit(data: &[u8]) -> &'static str {
    let (Some(limits), Some(steps)) = (data.first_chunk(), data.get(15..)) else { return "no-limits" };
    let limits = limits_of(limits);
    let interval = limits.ntp_interval_ns.unwrap_or(1);
    let mut admission = limits.admission(Box::new(|| 3)).expect("no contradiction").expect("limits");
    let (mut now, mut answered, mut last) = (0_i64, HashMap::new(), Verdict::Answer);
    for step in steps.chunks_exact(5) {
        let who = address([step[0], step[1], step[2]]);
        // From none to a year; a host that runs for a century is another's concern.
        now = (now + (i64::from(step[3]) << (step[4] % 48))).min(i64::MAX / 2);
        last = admission.judge(who, now);
        let is_denied = step[1] & 128 != 0;
        assert!(is_denied || !matches!(last, Verdict::Denied | Verdict::KissDeny));
        assert!(!is_denied || !matches!(last, Verdict::Answer | Verdict::RateLimited));
        assert!(last != Verdict::KissDeny || limits.kiss_denied);
        assert!(last != Verdict::KissRate || limits.kiss_above);
        assert!(last != Verdict::OverCap || limits.ntp_pps.is_some());
        if who.is_ipv4() && !is_denied && limits.ntp_pps.is_none() && !answered.contains_key(&who) {
            assert_eq!(last, Verdict::Answer, "whoever has asked for nothing yet has all tokens");
        }
        if last == Verdict::Answer {
            let count = answered.entry(who).or_insert(0_i64);
            *count += 1;
            let most = i64::from(limits.ntp_burst).saturating_add(now / interval).saturating_add(1);
            assert!(admission.forgotten() > 0 || *count <= most, "a burst, and one an interval");
        }
    }
    last.label()
}

fn limits_of(octets: &[u8; 15]) -> Limits {
    let number =
        |places: std::ops::Range<usize>| octets[places].iter().fold(0, |sum, octet| sum << 8 | u64::from(*octet));
    let prefix = |text: &str| text.parse::<Prefix>().expect("a prefix");
    let (cap, told) = (u16::try_from(number(12..14)).expect("two octets"), octets[14]);
    Limits {
        deny: vec![prefix("10.0.128.0/17"), prefix("2001:db8:8000::/33")],
        kiss_denied: told & 1 != 0,
        // An hour and 13 minutes at most, as settings have it.
        ntp_interval_ns: Some((number(0..8) >> 22).cast_signed().max(1)),
        ntp_burst: u32::try_from(number(8..12)).expect("four octets").max(1),
        // What is drawn is 3: nothing is answered nor told by chance.
        ntp_leak: u32::MAX,
        ntp_kod: u32::from(told & 2),
        ntp_pps: (cap > 0).then(|| f64::from(cap) / 16.0),
        kiss_above: told & 4 != 0,
        ..Limits::default()
    }
}

/// IPv4 and IPv6 by turns; of the latter the same /64 and /48 often.
fn address([kind, middle, last]: [u8; 3]) -> IpAddr {
    if kind & 1 == 0 {
        Ipv4Addr::new(10, 0, middle, last).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, u16::from(middle) << 8, u16::from(last) & 3, 0, 0, 0, last.into()).into()
    }
}
