//! The path of a packet takes no memory: a thread that answers does so in what it has had from the start.

use std::net::UdpSocket;
use std::os::fd::AsFd;

use arrayvec::ArrayVec;
use assert_no_alloc::{AllocDisabler, assert_no_alloc};
use nts_engine::admission::{Limits, Verdict};
use nts_engine::aead::{AeadId, SessionKeys};
use nts_engine::batch::{self, Inbox, Letter};
use nts_engine::cookies::{self, Keyring, NONCE};
use nts_engine::packet::{AUTHENTICATOR, COOKIE, ClockState, HEADER, UNIQUE_IDENTIFIER};
use nts_engine::server::{self, LANES, Outcome, Place, Reply, Request, World};
use nts_engine::siv::{self, Sealing, SivKey, TAG};

#[global_allocator]
static GUARD: AllocDisabler = AllocDisabler;

const CLOCK: ClockState = ClockState {
    leap: 0,
    stratum: 2,
    precision: -20,
    root_delay: 0,
    root_dispersion: 0,
    reference_id: [127, 0, 0, 1],
    reference: 0,
};

/// Answers leave for the same socket, by the calls of the engine.
struct Still {
    socket: UdpSocket,
    peer: Inbox,
    together: usize,
    refused: usize,
}

impl Still {
    fn new(together: usize) -> Self {
        let (socket, mut peer) = (UdpSocket::bind("127.0.0.1:0").unwrap(), Inbox::new());
        socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
        assert_eq!(peer.receive(socket.as_fd()).unwrap(), 1);
        Self { socket, peer, together, refused: 0 }
    }
}

impl World for Still {
    fn together(&self) -> usize {
        self.together
    }

    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>) {
        let peer = self.peer.datagram(0).peer;
        let mut letters = ArrayVec::<_, LANES>::new();
        letters.extend(answers.map(|(_, reply)| Letter { octets: &reply.octets[..reply.length], peer, origin: None }));
        self.refused += batch::send(self.socket.as_fd(), &letters);
    }

    fn departure(&mut self, place: Place) -> i64 {
        i64::try_from(place.ahead).unwrap_or(0)
    }

    fn random(&mut self, lane: usize, room: &mut [u8]) {
        room.fill(lane.to_le_bytes()[0]);
    }
}

fn field(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    [&kind.to_be_bytes(), &length.to_be_bytes(), value].concat()
}

/// A request with one cookie, as a client with a full jar sends it.
fn request(keyring: &Keyring, number: u8) -> Vec<u8> {
    let both = [number; 64];
    let keys = SessionKeys::new(AeadId::SivCmac256, &both).unwrap();
    let mut cookie = vec![0; cookies::length(AeadId::SivCmac256)];
    keyring.seal(&keys, &[number; NONCE], &mut cookie);
    let mut datagram = plain();
    datagram.extend(field(UNIQUE_IDENTIFIER, &[number; 32]));
    datagram.extend(field(COOKIE, &cookie));
    let key = SivKey::new(keys.c2s()).unwrap();
    let mut job = [Sealing { key: &key, data: &datagram, nonce: &[number; 16], text: &mut [], tag: &mut [0; TAG] }];
    siv::seal(&mut job);
    let sealed = [&[0, 16, 0, 16][..], &[number; 16], &*job[0].tag].concat();
    datagram.extend(field(AUTHENTICATOR, &sealed));
    datagram
}

fn plain() -> Vec<u8> {
    let mut datagram = vec![0; HEADER];
    datagram[0] = 4 << 3 | 3;
    datagram
}

#[test]
fn an_answer_takes_no_memory() {
    let keyring = Keyring::new(&[(2, [2; 32]), (1, [1; 32])]).unwrap();
    let datagrams: Vec<_> = (0..8).map(|number| if number < 6 { request(&keyring, number) } else { plain() }).collect();
    let requests: Vec<_> =
        datagrams.iter().map(|datagram| Request { datagram, received: 0, kiss: None }).take(LANES).collect();
    for together in [1, 3, LANES] {
        let (mut world, mut inbox) = (Still::new(together), Inbox::new());
        let mut replies: Vec<_> = requests.iter().map(|_| Reply::default()).collect();
        assert_no_alloc(|| server::respond(&keyring, &CLOCK, &requests, &mut replies, &mut world));
        let answered = |outcome| replies.iter().filter(|reply| reply.outcome == outcome).count();
        assert_eq!((answered(Outcome::NtsTime), answered(Outcome::Time)), (6, 2));
        let left = assert_no_alloc(|| inbox.receive(world.socket.as_fd()));
        assert_eq!((left.unwrap(), world.refused), (LANES, 0));
    }
}

#[test]
fn to_judge_an_address_takes_no_memory() {
    let limits = Limits { ntp_interval_ns: Some(1_000_000_000), ntp_burst: 1, ntp_pps: Some(1e6), ..Limits::default() };
    let mut admission = limits.admission(Box::new(|| 1)).unwrap().unwrap();
    let mut dropped = 0_usize;
    assert_no_alloc(|| {
        for number in 0..200_000_u32 {
            let address = std::net::Ipv4Addr::from(number / 2).into();
            dropped += usize::from(admission.judge(address, i64::from(number)) != Verdict::Answer);
        }
    });
    assert!(dropped >= 90_000, "{dropped}");
}
