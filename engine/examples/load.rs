//! Keeps an NTP server busy with datagrams that were made beforehand: the client of `bench`.
//!
//! `load SERVER SOURCES LENGTH SECONDS SAMPLES [RATE] < requests`: requests of one length, one after the other. Each of
//! the SOURCES (addresses, separated by commas) has a socket of its own. Without a RATE each keeps a window of requests
//! in flight; with one, so many a second are sent in all, whatever comes back. One JSON object tells what came of it,
//! with some of the replies, evenly taken, in hexadecimal digits.
//!
//! A batch of requests goes through the kernel as one datagram up to the server's socket, where it is taken apart
//! (`UDP_SEGMENT`). So it costs less to ask than to answer, and one core of ours keeps more than one core busy.

use std::env::args;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::process::exit;
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, mem};

use nts_engine::batch::Inbox;

/// As in `bench/load.py`, where the reasons are.
const WINDOW: usize = 96;
const BATCH: usize = 32;
const NAP_ANSWERS: f64 = 16.0;
const LONGEST_NAP: f64 = 2e-3;
const SILENCE: Duration = Duration::from_millis(250);
/// Answers that come in one go do not overflow it.
const RECEIVE_BUFFER: i32 = 4 * 1024 * 1024;

/// What is to be done.
struct Plan {
    requests: Vec<u8>,
    length: usize,
    duration: Duration,
    samples: f64,
    rate: Option<f64>,
}

/// One socket, which request it sends next, and how many wait for an answer.
struct Client {
    socket: UdpSocket,
    next: usize,
    in_flight: usize,
}

#[derive(Default)]
struct Found {
    sent: usize,
    answered: usize,
    seconds: f64,
    sample: Vec<String>,
}

fn main() {
    let given: Vec<String> = args().skip(1).collect();
    let [server, sources, length, seconds, samples, rate @ ..] = &given[..] else {
        fail("load SERVER SOURCES LENGTH SECONDS SAMPLES [RATE]")
    };
    let plan = Plan {
        requests: Vec::new(),
        length: number(length),
        duration: Duration::from_secs_f64(number(seconds)),
        samples: number(samples),
        rate: rate.first().map(|text| number(text)),
    };
    match ask(plan, server, sources) {
        Ok(found) if found.answered > 0 => println!("{}", document(&found)),
        Ok(found) => fail(&format!("no answer to {} requests", found.sent)),
        Err(error) => fail(&format!("the server is gone: {error}")),
    }
}

fn fail(why: &str) -> ! {
    eprintln!("{why}");
    exit(1)
}

fn number<T: FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| fail(&format!("{text} is no number")))
}

fn ask(mut plan: Plan, server: &str, sources: &str) -> io::Result<Found> {
    io::stdin().read_to_end(&mut plan.requests)?;
    // So that a nap is as short as it is said to be.
    fs::write("/proc/self/timerslack_ns", "1")?;
    let sources: Vec<&str> = sources.split(',').collect();
    let mut clients = Vec::with_capacity(sources.len());
    for (place, source) in sources.iter().enumerate() {
        let socket = UdpSocket::bind((*source, 0))?;
        socket.connect(server)?;
        set(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, i32::try_from(plan.length).unwrap_or(i32::MAX))?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BUFFER)?;
        clients.push(Client { socket, next: plan.count() * place / sources.len(), in_flight: 0 });
    }
    plan.run(&mut clients)
}

#[allow(unsafe_code)]
fn set(socket: &UdpSocket, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(mem::size_of::<i32>()).unwrap_or(0);
    // SAFETY: `socket` keeps the descriptor open, and setsockopt(2) reads `length` octets, which is what an i32 has, from
    // a value that lives until the call returns.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Plan {
    fn count(&self) -> usize {
        self.requests.len() / self.length
    }

    fn run(&self, clients: &mut [Client]) -> io::Result<Found> {
        let mut found = Found::default();
        let mut inbox = Inbox::new();
        let started = Instant::now();
        let (mut now, mut heard, mut gave_up) = (started, started, started);
        while now - started < self.duration || clients.iter().any(|client| client.in_flight > 0) {
            let elapsed = (now - started).as_secs_f64();
            if now - started < self.duration {
                found.sent += self.send(clients, elapsed, found.sent)?;
            }
            let before = found.answered;
            for client in &mut *clients {
                let Some(count) = done(inbox.receive(client.socket.as_fd()))? else { continue };
                found.answered += count;
                client.in_flight = client.in_flight.saturating_sub(count);
                // As many from the beginning of the run as from its end.
                if count_of(found.sample.len()) < self.samples * (elapsed / self.duration.as_secs_f64()).min(1.0) {
                    found.sample.push(hexadecimal(inbox.datagram(0).octets));
                }
            }
            if found.answered > before {
                heard = now;
            } else if now - heard.max(gave_up) > SILENCE {
                gave_up = now;
                for client in &mut *clients {
                    client.in_flight = 0;
                }
            } else {
                let nap = NAP_ANSWERS * elapsed / count_of(found.answered + 1);
                sleep(Duration::from_secs_f64(nap.min(LONGEST_NAP)));
            }
            now = Instant::now();
        }
        found.seconds = (heard - started).as_secs_f64();
        Ok(found)
    }

    /// A batch for each socket whose turn it is; how many requests were sent.
    fn send(&self, clients: &mut [Client], elapsed: f64, sent: usize) -> io::Result<usize> {
        let mut total = 0;
        for (place, left) in (1..=clients.len()).rev().enumerate() {
            let client = &mut clients[place];
            let room = match self.rate {
                None => WINDOW.saturating_sub(client.in_flight) / BATCH * BATCH,
                // Of all that is due now an equal share of those sockets that are left.
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a count of seconds, not of years
                Some(rate) => ((rate * elapsed) as usize).saturating_sub(sent + total).div_ceil(left),
            };
            let batch = BATCH.min(room).min(self.count() - client.next);
            let octets = &self.requests[client.next * self.length..][..batch * self.length];
            if batch > 0 && done(client.socket.send(octets))?.is_some() {
                client.next = (client.next + batch) % self.count();
                client.in_flight += batch;
                total += batch;
            }
        }
        Ok(total)
    }
}

#[allow(clippy::cast_precision_loss)] // nobody counts to 2**53
fn count_of(number: usize) -> f64 {
    number as f64
}

/// None when the kernel has nothing, or no room, at the moment.
fn done(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
        result => result.map(Some),
    }
}

fn hexadecimal(octets: &[u8]) -> String {
    octets.iter().fold(String::new(), |mut text, octet| {
        let _ = write!(text, "{octet:02x}");
        text
    })
}

fn document(found: &Found) -> String {
    // Nanoseconds on a processor come first there.
    let spent = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    format!(
        r#"{{"answered": {}, "lost": {}, "seconds": {}, "cpu_ns": {}, "sample": {:?}}}"#,
        found.answered,
        found.sent.saturating_sub(found.answered),
        found.seconds,
        spent.split(' ').next().unwrap_or("0"),
        found.sample
    )
}
