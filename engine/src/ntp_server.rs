//! UDP around `server`: threads, batches of datagrams, the kernel's receive times, counters by outcome.
//!
//! Each thread has one socket of each place where NTP is served (`SO_REUSEPORT`), and nothing that it shares with
//! another but what is swapped whole: no step of a packet takes a lock or memory.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use arrayvec::ArrayVec;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rand::rngs::{StdRng, SysRng};
use rand::{Rng, SeedableRng};

use crate::admission::{Admission, Limits, Verdict};
use crate::batch::{self, BATCH, Datagram, Inbox, Letter, Name, Origin};
use crate::cookies::{Keyring, Role};
use crate::packet::ClockState;
use crate::server::{self, Kiss, LANES, Outcome, Place, Reply, Request, World};
use crate::threads::{Answer, Threads, WAKE};

/// What is said of the clock, and until when.
pub struct Clock {
    pub state: ClockState,
    /// Added to the host's time (a test option).
    pub offset_ns: i64,
    pub good_until: Option<Instant>,
}

/// The clock of an agent that has not been heard for too long.
const UNSYNCHRONISED: ClockState = ClockState {
    leap: 3,
    stratum: 16,
    precision: -20,
    root_delay: 0,
    root_dispersion: 0,
    reference_id: [0; 4],
    reference: 0,
};

/// What all threads read, and the agent swaps.
pub struct Shared {
    pub keyring: ArcSwap<Keyring>,
    pub clock: ArcSwap<Clock>,
}

/// A counter that one thread writes and others may read.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, number: u64) {
        // Cheaper than an atomic addition, and the same where one thread alone writes.
        self.0.store(self.0.load(Relaxed).wrapping_add(number), Relaxed);
    }

    pub(crate) fn set(&self, number: u64) {
        self.0.store(number, Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one thread has counted.
#[derive(Default)]
pub struct Counts {
    outcomes: [Counter; Outcome::ALL.len()],
    /// Datagrams that were dropped by their source address alone.
    verdicts: [Counter; Verdict::ALL.len()],
    receive_errors: Counter,
    send_errors: Counter,
    /// Batches that were given up by a fault of ours.
    internal_errors: Counter,
    opened: [Counter; ROLES.len()],
    /// Cookies given in answers.
    pub sealed: Counter,
    /// Token buckets that were forgotten before they were full.
    pub forgotten: Counter,
}

impl Counts {
    /// Datagrams by what became of them, and errors.
    pub fn by_label(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let outcomes = Outcome::ALL.iter().zip(&self.outcomes).map(|(each, count)| (each.label(), count.get()));
        let verdicts = Verdict::ALL.iter().zip(&self.verdicts).map(|(each, count)| (each.label(), count.get()));
        let errors = [
            ("receive-error", self.receive_errors.get()),
            ("send-error", self.send_errors.get()),
            ("internal-error", self.internal_errors.get()),
        ];
        outcomes.chain(verdicts).chain(errors)
    }

    /// Cookies of authentic requests by what the key that opened them is there for.
    pub fn opened_by_role(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ROLES.iter().zip(&self.opened).map(|((_, label), count)| (*label, count.get()))
    }
}

/// What a master key is there for, in the order of its number, and the label of a counter.
pub const ROLES: [(Role, &str); 3] = [(Role::Next, "next"), (Role::Sealing, "sealing"), (Role::Retired, "retired")];

enum Command {
    Listen(usize, OwnedFd, Answer),
    Leave(usize, Answer),
}

/// All threads that answer NTP.
pub struct NtpThreads {
    threads: Threads<Command, Counts>,
}

impl NtpThreads {
    /// Start so many, which wait for sockets. The limits are those of each.
    ///
    /// # Errors
    /// Those of the operating system when it gives no thread, no descriptor or no randomness; limits that contradict
    /// themselves.
    pub fn start(count: usize, limits: &Limits, shared: &Arc<Shared>) -> io::Result<Self> {
        let threads = Threads::start(count, "ntp", |poll, commands, counts| {
            let mut random = StdRng::try_from_rng(&mut SysRng)?;
            let mut drawn = StdRng::from_rng(&mut random);
            let listener = Listener {
                poll,
                commands,
                counts,
                shared: shared.clone(),
                sockets: Vec::new(),
                replies: (0..LANES).map(|_| Reply::default()).collect(),
                admission: limits.admission(Box::new(move || drawn.next_u32())).map_err(io::Error::other)?,
                pace: Pace::default(),
                random,
                began: Instant::now(),
            };
            Ok(move || listener.run())
        })?;
        Ok(Self { threads })
    }

    /// Answer on bound datagram sockets, one for each thread, until `leave` is told the same number.
    ///
    /// # Errors
    /// Those of the operating system, and when there are not as many sockets as threads; the sockets are closed then.
    pub fn listen(&self, number: usize, sockets: Vec<OwnedFd>) -> io::Result<()> {
        let listen = |socket, answer| Command::Listen(number, socket, answer);
        self.threads.hand_out(sockets, listen, |answer| Command::Leave(number, answer))
    }

    /// Answer there no more. The sockets are closed when this returns.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn leave(&self, number: usize) -> io::Result<()> {
        self.threads.tell(|answer| Command::Leave(number, answer))
    }

    /// What each thread has counted.
    pub fn counts(&self) -> impl Iterator<Item = &Counts> {
        self.threads.counts()
    }

    /// Why one of them has ended by itself, if that is known.
    pub fn fault(&self) -> Option<String> {
        self.threads.fault()
    }

    /// How many threads live.
    pub fn alive(&self) -> usize {
        self.threads.alive()
    }

    /// Answer no more. Returns when all threads have ended.
    pub fn close(&self) {
        self.threads.close();
    }
}

struct Socket {
    number: usize,
    descriptor: OwnedFd,
    /// Whether something may be waiting there.
    is_ready: bool,
}

/// What one thread does.
struct Listener {
    poll: Poll,
    commands: Receiver<Command>,
    counts: Arc<Counts>,
    shared: Arc<Shared>,
    sockets: Vec<Option<Socket>>,
    replies: Box<[Reply]>,
    admission: Option<Admission>,
    pace: Pace,
    random: StdRng,
    /// What the times of `admission` are counted from.
    began: Instant,
}

impl Listener {
    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(BATCH);
        let mut inbox = Inbox::new();
        loop {
            // A server that has to wait for what it answers keeps up with it.
            let keeps_up = !self.look(&mut events, Some(Duration::ZERO))?;
            if keeps_up {
                self.look(&mut events, None)?;
            }
            let together = if keeps_up { 1 } else { LANES };
            for event in &events {
                if event.token() == WAKE {
                    if self.obey().is_break() {
                        return Ok(());
                    }
                } else if let Some(Some(socket)) = self.sockets.get_mut(event.token().0) {
                    socket.is_ready = true;
                }
            }
            for position in 0..self.sockets.len() {
                // Whatever it is, it costs the one batch.
                if catch_unwind(AssertUnwindSafe(|| self.drain(position, &mut inbox, together))).is_err() {
                    self.counts.internal_errors.add(1);
                }
            }
        }
    }

    /// Wait for so long at most, or until something comes; whether there is something to be done.
    fn look(&mut self, events: &mut Events, patience: Option<Duration>) -> io::Result<bool> {
        match self.poll.poll(events, patience) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        Ok(!events.is_empty() || self.sockets.iter().flatten().any(|socket| socket.is_ready))
    }

    fn obey(&mut self) -> ControlFlow<()> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Listen(number, descriptor, answer)) => {
                    let _ = answer.send(self.listen(number, descriptor));
                }
                Ok(Command::Leave(number, answer)) => {
                    for place in &mut self.sockets {
                        // To close it is to leave the event queue.
                        place.take_if(|socket| socket.number == number);
                    }
                    let _ = answer.send(Ok(()));
                }
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn listen(&mut self, number: usize, descriptor: OwnedFd) -> io::Result<()> {
        let free = self.sockets.iter().position(Option::is_none).unwrap_or_else(|| {
            self.sockets.push(None);
            self.sockets.len() - 1
        });
        self.poll.registry().register(&mut SourceFd(&descriptor.as_raw_fd()), Token(free), Interest::READABLE)?;
        // What came before is told by no event.
        self.sockets[free] = Some(Socket { number, descriptor, is_ready: true });
        Ok(())
    }

    /// Answer one batch.
    fn drain(&mut self, position: usize, inbox: &mut Inbox, together: usize) {
        let Some(Some(socket)) = self.sockets.get_mut(position) else { return };
        if !socket.is_ready {
            return;
        }
        let count = match inbox.receive(socket.descriptor.as_fd()) {
            Ok(count) => count,
            Err(error) => {
                if error.kind() == io::ErrorKind::WouldBlock {
                    socket.is_ready = false;
                } else {
                    self.counts.receive_errors.add(1);
                }
                return;
            }
        };
        // The call ends before its room does when it has found nothing more.
        socket.is_ready = count == BATCH;
        let (keyring, clock) = (self.shared.keyring.load(), self.shared.clock.load());
        let now = Instant::now();
        let turn = Turn {
            keyring: &keyring,
            state: if clock.good_until.is_none_or(|end| now < end) { &clock.state } else { &UNSYNCHRONISED },
            offset_ns: clock.offset_ns,
            counts: &self.counts,
            inbox,
            socket: socket.descriptor.as_fd(),
            together,
        };
        let elapsed = i64::try_from((now - self.began).as_nanos()).unwrap_or(i64::MAX);
        let admission = &mut self.admission;
        let mut admitted = (0..count).filter_map(|place| turn.admit(admission.as_mut(), place, elapsed));
        while turn.answer(&mut admitted, &mut self.replies, &mut self.pace, &mut self.random) {}
        self.counts.forgotten.set(self.admission.as_ref().map_or(0, Admission::forgotten));
    }
}

/// One batch, and what all of its answers have in common.
struct Turn<'a> {
    keyring: &'a Keyring,
    state: &'a ClockState,
    offset_ns: i64,
    counts: &'a Counts,
    inbox: &'a Inbox,
    socket: BorrowedFd<'a>,
    /// As many as are worked on while the server is behind. What is cheaper for it is worse for its clients: the times of
    /// all are taken at once, and the kernel lets others run between two of them. So they leave one by one as long as
    /// the server keeps up.
    together: usize,
}

impl Turn<'_> {
    /// The place of a datagram that is answered, and the kiss code that it is to get.
    fn admit(&self, admission: Option<&mut Admission>, place: usize, now: i64) -> Option<(usize, Option<Kiss>)> {
        let Some(admission) = admission else { return Some((place, None)) };
        let verdict = admission.judge(self.inbox.datagram(place).peer.address(), now);
        match verdict {
            Verdict::Answer => Some((place, None)),
            Verdict::KissRate => Some((place, Some(Kiss::Rate))),
            Verdict::KissDeny => Some((place, Some(Kiss::Deny))),
            Verdict::RateLimited | Verdict::OverCap | Verdict::Denied => {
                self.counts.verdicts[verdict as usize].add(1);
                None
            }
        }
    }

    /// Answer as many of these as there are lanes; whether there may be more.
    fn answer(
        &self,
        admitted: &mut impl Iterator<Item = (usize, Option<Kiss>)>,
        replies: &mut [Reply],
        pace: &mut Pace,
        random: &mut StdRng,
    ) -> bool {
        let (mut requests, mut senders) = (ArrayVec::<_, LANES>::new(), ArrayVec::<_, LANES>::new());
        for (place, kiss) in admitted.take(LANES) {
            let Datagram { octets, peer, received, origin } = self.inbox.datagram(place);
            let received = received.unwrap_or_else(unix_ns) + self.offset_ns;
            requests.push(Request { datagram: octets, received, kiss });
            senders.push((peer, origin));
        }
        let mut world = Running { turn: self, senders: &senders, pace, group: None, random };
        server::respond(self.keyring, self.state, &requests, replies, &mut world);
        replies[..requests.len()].iter().filter(|reply| reply.length == 0).for_each(|reply| self.count(reply));
        requests.is_full()
    }

    fn count(&self, reply: &Reply) {
        self.counts.outcomes[reply.outcome as usize].add(1);
        if let Some(role) = reply.opened {
            self.counts.opened[role as usize].add(1);
        }
        if reply.sealed > 0 {
            self.counts.sealed.add(reply.sealed as u64);
        }
    }
}

/// How long it takes from the moment when the time is taken to the wire, by what answers leave together.
///
/// Several answers leave by one system call, and their times are sealed before it. So each is told when its turn will
/// come, as in other groups of the kind: the clients of a busy server would find it late otherwise. What the call does
/// with an answer before it is on the wire is not reckoned with, and a turn is told as the quickest of late were, so that
/// hardly an answer says that it left later than it did.
#[derive(Default)]
struct Pace {
    plain: [Steps; LANES],
    nts: [Steps; LANES],
}

/// Of groups of one kind and size: until the first one's turn, and from one to the next.
#[derive(Default)]
struct Steps {
    sealing: Usual<16>,
    letter: Usual<1024>,
}

impl Pace {
    fn of(&mut self, Place { answers, is_nts, .. }: Place) -> &mut Steps {
        let sizes = if is_nts { &mut self.nts } else { &mut self.plain };
        &mut sizes[answers - 1]
    }
}

impl Steps {
    /// From the time taken to the turn of an answer that has so many `ahead` of it, in nanoseconds.
    #[allow(clippy::cast_possible_wrap)] // there are no more than `LANES`
    fn until(&self, ahead: usize) -> i64 {
        self.sealing.get() + self.letter.get() * ahead as i64
    }

    /// What a group has taken, and all of its letters together.
    #[allow(clippy::cast_possible_wrap)] // see above
    fn learn(&mut self, sealing: i64, sending: i64, letters: usize) {
        self.sealing.add(sealing);
        self.letter.add(sending / letters.max(1) as i64);
    }
}

/// Nanoseconds that something usually takes when nobody else is served meanwhile: near the least of late, the nearer the
/// greater `SLOWNESS` is, a power of two.
#[derive(Clone, Copy, Default)]
struct Usual<const SLOWNESS: i64> {
    /// In `SLOWNESS`ths, so that small steps are not lost.
    parts: i64,
}

impl<const SLOWNESS: i64> Usual<SLOWNESS> {
    /// How far above it one value counts, so that a slow host gets there, and a long wait is soon forgotten.
    const STEP: i64 = 500;

    fn get(self) -> i64 {
        self.parts / SLOWNESS
    }

    fn add(&mut self, value: i64) {
        let more = value - self.get();
        self.parts += if more < 0 { (more * SLOWNESS / 2).max(-self.parts) } else { more.min(self.get() + Self::STEP) };
    }
}

/// The host's own time, randomness and network, for one batch of answers.
struct Running<'a> {
    turn: &'a Turn<'a>,
    /// Where the request of each lane came from, and what it was sent to.
    senders: &'a [(&'a Name, Option<Origin>)],
    pace: &'a mut Pace,
    /// Of the answers that will leave next: when the time was taken, of which all are told, and the place of one.
    group: Option<(i64, Place)>,
    random: &'a mut StdRng,
}

impl World for Running<'_> {
    fn random(&mut self, _lane: usize, room: &mut [u8]) {
        self.random.fill_bytes(room);
    }

    fn together(&self) -> usize {
        self.turn.together
    }

    fn departure(&mut self, place: Place) -> i64 {
        let (began, _) = *self.group.get_or_insert_with(|| (unix_ns(), place));
        began + self.pace.of(place).until(place.ahead) + self.turn.offset_ns
    }

    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>) {
        let mut letters = ArrayVec::<_, LANES>::new();
        letters.extend(answers.map(|(lane, reply)| {
            self.turn.count(reply);
            let (peer, origin) = &self.senders[lane];
            Letter { octets: &reply.octets[..reply.length], peer, origin: origin.as_ref() }
        }));
        if letters.is_empty() {
            return;
        }
        let sealed = unix_ns();
        let refused = batch::send(self.turn.socket, &letters);
        if let Some((began, place)) = self.group.take() {
            self.pace.of(place).learn(sealed - began, unix_ns() - sealed, letters.len());
        }
        self.turn.counts.send_errors.add(refused as u64);
    }
}

/// The host's time in Unix nanoseconds.
#[allow(clippy::cast_possible_truncation)] // until the year 2262
fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or_else(|early| -(early.duration().as_nanos() as i64), |late| late.as_nanos() as i64)
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    #[test]
    fn a_group_is_told_when_the_turn_of_each_comes() {
        let (mut pace, three) = (Pace::default(), Place { ahead: 0, answers: 3, is_nts: true });
        assert_eq!(pace.of(three).until(2), 0);
        for _ in 0..10_000 {
            pace.of(three).learn(1_600, 7_200, 3);
        }
        let turns = [0, 1, 2].map(|ahead| pace.of(three).until(ahead));
        assert!((1_580..=1_600).contains(&turns[0]) && (2_380..=2_400).contains(&(turns[2] - turns[1])), "{turns:?}");
        for other in [Place { answers: 2, ..three }, Place { is_nts: false, ..three }] {
            assert_eq!(pace.of(other).until(1), 0, "other groups are told nothing of it");
        }
    }

    fn near_the_least<const SLOWNESS: i64>(between: std::ops::RangeInclusive<i64>) {
        let (mut usual, mut random) = (Usual::<SLOWNESS>::default(), StdRng::seed_from_u64(1));
        for round in 0..50_000 {
            usual.add(if round % 10 == 0 { 50_000_000 } else { random.random_range(1_000..3_000) });
        }
        assert!(between.contains(&usual.get()), "a long wait now and then is no measure: {}", usual.get());
        usual.add(-3_600_000_000_000);
        assert_eq!(usual.get(), 0, "the clock was set back");
        for _ in 0..10 * SLOWNESS {
            usual.add(80_000);
        }
        assert!((79_000..=80_000).contains(&usual.get()), "a slow host gets there: {}", usual.get());
    }

    #[test]
    fn what_is_usual_is_near_the_least_and_never_below_nothing() {
        near_the_least::<16>(1_100..=1_900);
        near_the_least::<1024>(1_000..=1_200);
    }
}
