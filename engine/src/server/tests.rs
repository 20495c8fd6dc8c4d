use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};

use super::*;
use crate::aead::{AeadId, SessionKeys, Work};

const ALGORITHMS: [AeadId; 4] = [AeadId::SivCmac256, AeadId::SivCmac384, AeadId::SivCmac512, AeadId::Aes128GcmSiv];
const CLOCK: ClockState = ClockState {
    leap: 1,
    stratum: 3,
    precision: -25,
    root_delay: 17,
    root_dispersion: 19,
    reference_id: *b"TEST",
    reference: 23,
};
const NOW: i64 = 1_800_000_000_123_456_789;

fn keyring() -> Keyring {
    Keyring::new(&[(9, [1; 32]), (8, [2; 32]), (7, [3; 32])]).unwrap()
}

#[derive(Debug, PartialEq)]
enum Call {
    Departure(Place),
    Random { lane: usize },
    Leave(Vec<usize>),
}

/// The same randomness for a request wherever in a batch it is.
struct Given<'a> {
    random: &'a [[u8; MOST_RANDOM]],
    together: usize,
    calls: Vec<Call>,
    left: [Vec<Vec<u8>>; LANES],
}

impl World for Given<'_> {
    fn together(&self) -> usize {
        self.together
    }

    fn departure(&mut self, place: Place) -> i64 {
        self.calls.push(Call::Departure(place));
        NOW
    }

    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>) {
        let mut lanes = Vec::new();
        for (lane, reply) in answers {
            lanes.push(lane);
            self.left[lane].push(reply.octets[..reply.length].to_vec());
        }
        self.calls.extend((!lanes.is_empty()).then_some(Call::Leave(lanes)));
    }

    fn random(&mut self, lane: usize, room: &mut [u8]) {
        self.calls.push(Call::Random { lane });
        room.copy_from_slice(&self.random[lane][..room.len()]);
    }
}

fn field(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &short(4 + value.len()), value].concat()
}

struct Client {
    keys: SessionKeys,
    cookie: Vec<u8>,
}

impl Client {
    fn new(algorithm: AeadId, rng: &mut StdRng) -> Self {
        let mut both = vec![0; 2 * algorithm.key_length()];
        rng.fill_bytes(&mut both);
        let keys = SessionKeys::new(algorithm, &both).unwrap();
        let mut cookie = vec![0; cookies::length(algorithm)];
        keyring().seal(&keys, &rng.random(), &mut cookie);
        Self { keys, cookie }
    }

    /// A request with so many placeholders in clear and so many that are hidden.
    fn request(&self, clear: usize, hidden: usize, rng: &mut StdRng) -> Vec<u8> {
        let mut datagram = vec![0; HEADER];
        rng.fill_bytes(&mut datagram);
        datagram[0] = 4 << 3 | CLIENT;
        datagram.extend(field(UNIQUE_IDENTIFIER, &rng.random::<[u8; 32]>()));
        datagram.extend(field(COOKIE, &self.cookie));
        let placeholder = field(COOKIE_PLACEHOLDER, &vec![0; self.cookie.len()]);
        datagram.extend(placeholder.repeat(clear));
        let (data, nonce) = (datagram.clone(), rng.random::<[u8; 16]>());
        let nonce = &nonce[..self.keys.aead.nonce_length()];
        let plaintext = placeholder.repeat(hidden);
        let mut sealed = vec![0; plaintext.len() + TAG];
        let place = text_in(self.keys.aead, sealed.len());
        sealed[place].copy_from_slice(&plaintext);
        let mut aead = ArrayVec::new();
        Aead::of_packets(&mut aead, std::iter::once((self.keys.aead, self.keys.c2s())));
        aead::seal(std::iter::once(Work { aead: &aead[0], nonce, data: &data, sealed: &mut sealed }));
        let body = [&short(nonce.len())[..], &short(sealed.len()), nonce, &sealed].concat();
        datagram.extend(field(AUTHENTICATOR, &body));
        datagram
    }

    /// The cookies in an authentic answer.
    fn cookies(&self, answer: &[u8]) -> Vec<Vec<u8>> {
        let authenticator = Fields::new(answer, HEADER, MIN_FIELD).map(Result::unwrap).last().unwrap();
        let parts = Authenticator::read(answer, &authenticator).unwrap();
        let mut aead = ArrayVec::new();
        Aead::of_packets(&mut aead, std::iter::once((self.keys.aead, self.keys.s2c())));
        let mut sealed = answer[parts.ciphertext].to_vec();
        let (mut verdict, data) = (false, &answer[..authenticator.start]);
        let work = Work { aead: &aead[0], nonce: &answer[parts.nonce], data, sealed: &mut sealed };
        aead::open(std::iter::once((work, &mut verdict)));
        assert!(verdict);
        let text = &sealed[text_in(self.keys.aead, sealed.len())];
        Fields::new(text, 0, MIN_HIDDEN_FIELD).map(|field| text[field.unwrap().value()].to_vec()).collect()
    }
}

/// What can be told of a reply.
type Told = (Outcome, Vec<u8>, Option<Role>, usize);

fn ask(asked: &[(Vec<u8>, Option<Kiss>)], random: &[[u8; MOST_RANDOM]], together: usize) -> (Vec<Told>, Vec<Call>) {
    let requests: Vec<Request> =
        asked.iter().map(|(datagram, kiss)| Request { datagram, received: NOW - 1000, kiss: *kiss }).collect();
    let mut replies: Vec<Reply> = asked.iter().map(|_| Reply { length: 99, ..Reply::default() }).collect();
    let mut world = Given { random, together, calls: Vec::new(), left: Default::default() };
    respond(&keyring(), &CLOCK, &requests, &mut replies, &mut world);
    for (reply, left) in replies.iter().zip(&world.left) {
        let once = (reply.length > 0).then(|| reply.octets[..reply.length].to_vec());
        assert_eq!(*left, once.into_iter().collect::<Vec<_>>(), "what is in the reply has left, once");
    }
    let told =
        replies.iter().map(|reply| (reply.outcome, reply.octets[..reply.length].to_vec(), reply.opened, reply.sealed));
    (told.collect(), world.calls)
}

fn alone(datagram: Vec<u8>) -> Told {
    ask(&[(datagram, None)], &[[5; MOST_RANDOM]], LANES).0.remove(0)
}

/// Valid, plain, cut off, mutated and senseless datagrams.
fn any(rng: &mut StdRng) -> Vec<u8> {
    let client = Client::new(*ALGORITHMS.choose(rng).unwrap(), rng);
    let (clear, hidden) = (rng.random_range(0..9), [0, 0, 1, 3][rng.random_range(0..4)]);
    let mut datagram = client.request(clear, hidden, rng);
    match rng.random_range(0..8) {
        0 => datagram.truncate(HEADER),
        1 => datagram.truncate(rng.random_range(0..datagram.len())),
        2 => datagram.truncate(rng.random_range(0..datagram.len()) / 4 * 4),
        3 => {
            datagram.resize(rng.random_range(0..2100), 0);
            rng.fill_bytes(&mut datagram);
        }
        4 | 5 => {
            let place = rng.random_range(0..datagram.len());
            datagram[place] ^= 1 << rng.random_range(0..8);
        }
        _ => {}
    }
    datagram
}

#[test]
fn a_batch_is_answered_as_one_at_a_time_and_never_at_greater_length() {
    let mut rng = StdRng::seed_from_u64(8915);
    let mut seen = [0; Outcome::ALL.len()];
    for _ in 0..400 {
        let kisses = [None, None, None, None, Some(Kiss::Rate), Some(Kiss::Deny)];
        let asked: Vec<_> =
            (0..rng.random_range(0..=LANES)).map(|_| (any(&mut rng), *kisses.choose(&mut rng).unwrap())).collect();
        let random: Vec<[u8; MOST_RANDOM]> = asked.iter().map(|_| rng.random()).collect();
        let (together, _) = ask(&asked, &random, rng.random_range(1..=LANES));
        for ((told, asked), random) in together.into_iter().zip(&asked).zip(&random) {
            assert_eq!(told, ask(std::slice::from_ref(asked), &[*random], 1).0.remove(0));
            assert!(told.1.len() <= asked.0.len());
            seen[told.0 as usize] += 1;
        }
    }
    // Versions, modes and MACs come by chance too seldom; they have their own test.
    for outcome in [Outcome::Time, Outcome::NtsTime, Outcome::Ntsn, Outcome::KissRate, Outcome::Malformed] {
        assert!(seen[outcome as usize] > 20, "{outcome:?} is hardly ever seen");
    }
}

#[test]
fn answers_bring_cookies_whose_nonces_follow_the_answers_own() {
    let mut rng = StdRng::seed_from_u64(1);
    for algorithm in ALGORITHMS {
        for (clear, hidden) in [(0, 0), (1, 0), (0, 1), (2, 3), (7, 0), (6, 4)] {
            let client = Client::new(algorithm, &mut rng);
            let (asked, random) = (client.request(clear, hidden, &mut rng), rng.random());
            let (outcome, answer, opened, sealed) = ask(&[(asked.clone(), None)], &[random], 1).0.remove(0);
            assert_eq!((outcome, opened), (Outcome::NtsTime, Some(Role::Sealing)));
            assert_eq!(answer[24..32], asked[40..48]);
            assert_eq!(answer[32..40], stamp(NOW - 1000));
            assert_eq!(answer[40..48], stamp(NOW));
            assert_eq!(answer[48..84], asked[48..84]);
            let nonce = algorithm.nonce_length();
            assert_eq!(answer[92..92 + nonce], random[..nonce]);
            let cookies = client.cookies(&answer);
            assert_eq!((cookies.len(), sealed), ((1 + clear + hidden).min(MAX_COOKIES), cookies.len()));
            for (cookie, drawn) in cookies.iter().zip(random[nonce..].chunks(cookies::NONCE)) {
                assert_eq!(cookie[4..20], *drawn);
                let (keys, role) = keyring().open(cookie).unwrap();
                assert_eq!((keys.both(), role), (client.keys.both(), Role::Sealing));
            }
        }
    }
}

#[test]
fn the_time_is_taken_last_and_for_few_at_once_and_what_is_refused_delays_nobody() {
    let mut rng = StdRng::seed_from_u64(2);
    let client = Client::new(AeadId::SivCmac256, &mut rng);
    let nts = client.request(0, 0, &mut rng);
    let (plain, mut symmetric, mut forged) = (nts[..HEADER].to_vec(), nts[..HEADER].to_vec(), nts.clone());
    symmetric[0] = 0x21;
    forged[HEADER + 60] ^= 1;
    let mut asked: Vec<_> = [symmetric, plain, forged].into_iter().map(|datagram| (datagram, None)).collect();
    asked.push((nts.clone(), Some(Kiss::Rate)));
    asked.extend(vec![(nts, None); LANES - asked.len()]);
    let (_, calls) = ask(&asked, &[[0; MOST_RANDOM]; LANES], 4);

    let place = |ahead, answers, is_nts| Call::Departure(Place { ahead, answers, is_nts });
    let expected = [3, 4, 5, 6, 7].map(|lane| Call::Random { lane }).into_iter().chain([
        // What is told to come less often is told no time.
        place(1, 4, true),
        place(2, 4, true),
        place(3, 4, true),
        Call::Leave(vec![3, 4, 5, 6]),
        place(0, 1, true),
        Call::Leave(vec![7]),
        place(0, 1, false),
        Call::Leave(vec![1]),
        Call::Leave(vec![2]),
    ]);
    assert_eq!(calls, expected.collect::<Vec<_>>());
}

#[test]
fn each_reason_has_its_outcome() {
    let mut rng = StdRng::seed_from_u64(3);
    let client = Client::new(AeadId::SivCmac256, &mut rng);
    let good = client.request(0, 0, &mut rng);
    let with = |place: usize, value: u8| {
        let mut datagram = good.clone();
        datagram[place] = value;
        datagram
    };
    let (identifier, cookie, authenticator) = (HEADER, HEADER + 36, good.len() - 40);
    for (datagram, expected) in [
        (good.clone(), Outcome::NtsTime),
        (good[..HEADER].to_vec(), Outcome::Time),
        (good[..HEADER - 1].to_vec(), Outcome::Malformed),
        (good[..good.len() - 4].to_vec(), Outcome::Malformed),
        (good.repeat(10), Outcome::Malformed),
        (with(0, 4 << 3 | 4), Outcome::Mode),
        (with(0, 2 << 3 | CLIENT), Outcome::Version),
        (with(0, 3 << 3 | CLIENT), Outcome::IncompleteNts),
        (good[..HEADER + 20].to_vec(), Outcome::LegacyMac),
        (good[..authenticator].to_vec(), Outcome::IncompleteNts),
        ([&good[..identifier], &good[cookie..]].concat(), Outcome::IncompleteNts),
        ([&good[..cookie], &good[authenticator..]].concat(), Outcome::IncompleteNts),
        ([&good[..authenticator], &good[cookie..]].concat(), Outcome::IncompleteNts),
        (with(cookie + 4, 2), Outcome::Ntsn),
        (with(cookie + 60, good[cookie + 60] ^ 1), Outcome::Ntsn),
        (with(good.len() - 1, good[good.len() - 1] ^ 1), Outcome::Ntsn),
        // Lengths that do not fit the field.
        (with(authenticator + 5, 40), Outcome::Malformed),
        // A nonce of 8 octets, and no padding that makes up for it.
        ([&good[..authenticator], &bare_authenticator(8)].concat(), Outcome::Malformed),
    ] {
        let (outcome, answer, ..) = alone(datagram);
        assert_eq!(outcome, expected);
        assert_eq!(answer.is_empty(), !matches!(expected, Outcome::Time | Outcome::NtsTime | Outcome::Ntsn));
    }
}

/// An authenticator with a nonce of so many octets and an empty ciphertext's tag.
fn bare_authenticator(nonce: usize) -> Vec<u8> {
    field(AUTHENTICATOR, &[&short(nonce)[..], &short(TAG), &vec![0; nonce + TAG]].concat())
}
