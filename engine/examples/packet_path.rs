//! What one NTS request costs beside the sockets: all of `server::respond`, and its cryptography alone beside the
//! `aes-siv` crate's. Eight clients with different keys, 228 octets and one cookie each, as in `bench/`.
//!
//! `cargo run --release --no-default-features --example packet_path`. Rounds of all take turns, and the quickest of each
//! counts: what disturbs a round is not ours.

use std::hint::black_box;
use std::time::Instant;

use aes_siv::KeyInit;
use aes_siv::siv::Aes128Siv;
use nts_engine::aead::{Aead, AeadId, SessionKeys, Work, open, seal};
use nts_engine::cookies::{self, Keyring, NONCE};
use nts_engine::packet::ClockState;
use nts_engine::server::{LANES, Outcome, Place, Reply, Request, World, respond};
use nts_engine::siv;

const ROUNDS: u32 = 3000;
const REPEATS: u32 = 25;
const COOKIE: usize = 100;
const ECHO: usize = 36;
const CLEAR: usize = 48 + ECHO;
const SEALED: usize = CLEAR + 8 + 16;

/// A client: the secret in its cookie, and its request.
struct Client {
    keys: SessionKeys,
    datagram: Vec<u8>,
}

impl Client {
    fn new(keyring: &Keyring, number: u8) -> Self {
        let both: Vec<u8> = (0..64).map(|place| place * 5 + number * 37).collect();
        let keys = SessionKeys::new(AeadId::SivCmac256, &both).expect("64 octets");
        let mut datagram = vec![number; 48];
        datagram[0] = 0x23;
        datagram.extend([1, 4, 0, 36]);
        datagram.extend([number; 32]);
        datagram.extend([2, 4, 0, 104]);
        let mut cookie = [0; COOKIE];
        keyring.seal(&keys, &[number; NONCE], &mut cookie);
        datagram.extend(cookie);
        let clear = datagram.len();
        datagram.extend([4, 4, 0, 40, 0, 16, 0, 16]);
        datagram.extend([number ^ 0x5a; 16]);
        datagram.extend([0; 16]);
        let mut aead = arrayvec::ArrayVec::new();
        Aead::of_packets(&mut aead, [(keys.aead, keys.c2s())].into_iter());
        let (before, sealed) = datagram.split_at_mut(clear + 24);
        seal([Work { aead: &aead[0], nonce: &before[clear + 8..], data: &before[..clear], sealed }].into_iter());
        Self { keys, datagram }
    }

    fn cookie(&self) -> &[u8] {
        &self.datagram[CLEAR + 4..CLEAR + 4 + COOKIE]
    }

    fn nonce(&self) -> &[u8] {
        &self.datagram[CLEAR + 12 + COOKIE..CLEAR + 28 + COOKIE]
    }
}

struct Still;

impl World for Still {
    fn together(&self) -> usize {
        LANES
    }
    fn leave<'a>(&mut self, _: impl Iterator<Item = (usize, &'a Reply)>) {}
    fn departure(&mut self, _place: Place) -> i64 {
        1_700_000_000_000_000_000
    }
    fn random(&mut self, _: usize, room: &mut [u8]) {
        room.fill(7);
    }
}

type Contender<'a> = (&'a str, Box<dyn FnMut() + 'a>);

/// The octets of an answer whose header is zeroes.
type Answer = [u8; SEALED + 16 + 4 + COOKIE];

/// The same cryptography without the rest of `respond`.
fn ours(keyring: &Keyring, clients: &[Client]) -> Vec<Answer> {
    let mut recognised: Vec<_> = clients.iter().map(|client| keyring.recognise(client.cookie()).unwrap()).collect();
    let mut verdicts = [false; LANES];
    let mut jobs: Vec<_> = recognised.iter_mut().zip(&mut verdicts).map(|(cookie, ok)| cookie.opening(ok)).collect();
    siv::open(&mut jobs);
    drop(jobs);
    let mut aeads = arrayvec::ArrayVec::new();
    Aead::of_packets(&mut aeads, recognised.iter().map(|cookie| (cookie.keys.aead, cookie.keys.c2s())));
    let mut tags = [[0; 16]; LANES];
    for (tag, client) in tags.iter_mut().zip(clients) {
        tag.copy_from_slice(&client.datagram[212..]);
    }
    let work = clients.iter().zip(&aeads).zip(&mut tags).map(|((client, aead), sealed)| Work {
        aead,
        nonce: client.nonce(),
        data: &client.datagram[..CLEAR + 4 + COOKIE],
        sealed,
    });
    open(work.zip(&mut verdicts));
    assert_eq!(verdicts, [true; LANES]);
    let mut answers = vec![[0; _]; LANES];
    let mut jobs: Vec<_> = (answers.iter_mut().zip(&recognised))
        .map(|(answer, cookie): (&mut Answer, _)| {
            keyring.sealing(&cookie.keys, &[7; NONCE], &mut answer[SEALED + 20..])
        })
        .collect();
    siv::seal(&mut jobs);
    drop(jobs);
    let mut aeads = arrayvec::ArrayVec::new();
    Aead::of_packets(&mut aeads, recognised.iter().map(|cookie| (cookie.keys.aead, cookie.keys.s2c())));
    seal(answers.iter_mut().zip(&aeads).map(|(answer, aead)| {
        let (before, sealed) = answer.split_at_mut(SEALED);
        Work { aead, nonce: &[7; 16], data: &before[..CLEAR], sealed }
    }));
    answers
}

fn aes_siv(master: &mut Aes128Siv, clients: &[Client]) -> Vec<Answer> {
    let answer = |client: &Client| {
        let (mut keys, mut answer) = ([0; 64], [0; _]);
        let cookie = client.cookie();
        keys.copy_from_slice(&cookie[36..]);
        let tag = <[u8; 16]>::try_from(&cookie[20..36]).unwrap();
        master.decrypt_inout_detached([&cookie[..4], &cookie[4..20]], keys[..].as_mut().into(), &tag.into()).unwrap();
        let tag = <[u8; 16]>::try_from(&client.datagram[212..]).unwrap();
        let data = &client.datagram[..CLEAR + 4 + COOKIE];
        let mut c2s = Aes128Siv::new_from_slice(&keys[..32]).unwrap();
        c2s.decrypt_inout_detached([data, client.nonce()], (&mut [][..]).into(), &tag.into()).unwrap();
        let cookie = &mut answer[SEALED + 20..];
        cookie[..4].copy_from_slice(&client.cookie()[..4]);
        cookie[4..20].fill(7);
        cookie[36..].copy_from_slice(&keys);
        let (clear, text) = cookie.split_at_mut(36);
        let tag = master.encrypt_inout_detached([&clear[..4], &clear[4..20]], text.into()).unwrap();
        clear[20..].copy_from_slice(&tag);
        let mut s2c = Aes128Siv::new_from_slice(&keys[32..]).unwrap();
        let (before, text) = answer.split_at_mut(SEALED + 16);
        let tag = s2c.encrypt_inout_detached([&before[..CLEAR], &[7; 16]], text.into()).unwrap();
        before[SEALED..].copy_from_slice(&tag);
        answer
    };
    clients.iter().map(answer).collect()
}

fn main() {
    let master: Vec<u8> = (0..32).collect();
    let keyring = Keyring::new(&[(1, vec![1; 32]), (0, master.clone())]).expect("two keys");
    let clients: Vec<Client> = (0..8).map(|number| Client::new(&keyring, number)).collect();
    assert_eq!(cookies::length(clients[0].keys.aead), COOKIE);
    let mut theirs = Aes128Siv::new_from_slice(&master).expect("32 octets");
    assert!(ours(&keyring, &clients) == aes_siv(&mut theirs, &clients), "the same answers");

    let clock = ClockState::kiss(*b"NONE");
    let requests: Vec<_> =
        clients.iter().map(|client| Request { datagram: &client.datagram, received: 0, kiss: None }).collect();
    let mut replies: Vec<Reply> = (0..LANES).map(|_| Reply::default()).collect();
    let mut plain: Vec<Reply> = (0..LANES).map(|_| Reply::default()).collect();
    let mut alone = Reply::default();
    respond(&keyring, &clock, &requests, &mut replies, &mut Still);
    assert!(replies.iter().all(|reply| reply.outcome == Outcome::NtsTime && reply.length == 228));

    let mut contenders: [Contender; 5] = [
        ("aes-siv, cryptography", Box::new(|| drop(black_box(aes_siv(&mut theirs, black_box(&clients)))))),
        ("ours, cryptography", Box::new(|| drop(black_box(ours(&keyring, black_box(&clients)))))),
        (
            "respond, batches of 8",
            Box::new(|| respond(&keyring, &clock, black_box(&requests), &mut replies, &mut Still)),
        ),
        (
            "respond, one at a time",
            Box::new(|| {
                for request in black_box(&requests).chunks(1) {
                    respond(&keyring, &clock, request, std::slice::from_mut(&mut alone), &mut Still);
                }
            }),
        ),
        (
            "respond, plain NTP",
            Box::new(|| {
                let requests: [_; LANES] = std::array::from_fn(|lane| Request {
                    datagram: &black_box(&clients)[lane].datagram[..48],
                    received: 0,
                    kiss: None,
                });
                respond(&keyring, &clock, &requests, &mut plain, &mut Still);
            }),
        ),
    ];
    let mut least = [f64::INFINITY; 5];
    for _ in 0..ROUNDS {
        for ((_, run), least) in contenders.iter_mut().zip(&mut least) {
            let start = Instant::now();
            for _ in 0..REPEATS {
                run();
            }
            *least = least.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(REPEATS * 8));
        }
    }
    for ((name, _), least) in contenders.iter().zip(least) {
        println!("{name:24} {least:6.0} ns a request");
    }
}
