//! TCP around `tls` and `ke`: threads, one deadline a connection, slots shared among peers, counters by outcome.
//!
//! Each thread has one listening socket of each place where NTS-KE is served (`SO_REUSEPORT`). Whether a connection is
//! served is decided before anything is spent on it. No step of one waits for its peer.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read as _};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use socket2::{SockRef, Socket};

use crate::admission::{KeAdmission, Limits, Refused};
use crate::aead::AeadId;
use crate::cookies::Keyring;
use crate::ke::{self, KeReply, KeServer, KeTerms, NoKeys, NtpService, Outcome};
use crate::labels::labelled;
use crate::ntp_server::{Counter, Shared};
use crate::threads::{Answer, Threads, WAKE};
use crate::tls::{Credentials, TlsChannel};

/// The whole exchange, TLS included. chrony allows 2 s, ntpd-rs 1 s; mobile networks need more than either.
const DEADLINE: Duration = Duration::from_secs(5);
/// For the peer's close after our answer.
const LINGER: Duration = Duration::from_secs(1);
/// All that a peer may send, TLS included: a request of 16 KiB and a large `ClientHello` fit several times.
const MAX_RECEIVED: usize = 64 * 1024;
/// Of this what may come before TLS is established: a `ClientHello`, for which a stranger gets memory.
const MAX_HELLO: usize = 16 * 1024;
const READ: usize = 16 * 1024;
/// Connections accepted before everybody else gets a turn.
const BATCH: usize = 64;
/// Until the next look when there was no descriptor for a connection.
const PAUSE: Duration = Duration::from_millis(100);
const OUT_OF_RESOURCES: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
/// Local addresses and certificates whose NTP service is remembered.
const MAX_SERVICES: usize = 256;

/// What NTP service belongs to a connection that came in on a local address (as Python writes it), and was shown a
/// certificate of these names; None when that cannot be told, which is a fault of ours.
pub type ServiceAt = Arc<dyn Fn(&str, &[String]) -> Option<NtpService> + Send + Sync>;

labelled! {
    /// How a connection ended that brought no request; or why none came to be.
    pub enum Trouble {
        /// The deadline passed before TLS was established.
        TlsTimeout => "tls-timeout",
        /// The peer does not speak TLS 1.3 as we do.
        TlsFailed => "tls-failed",
        /// The peer went away.
        ConnectionLost => "connection-lost",
        /// The peer sent more than anybody needs to.
        TooLong => "too-long",
        /// The network took a connection away before it was accepted.
        AcceptError => "accept-error",
        /// There was no descriptor for a connection.
        NoDescriptor => "no-descriptor",
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Answered(Outcome),
    Failed(Trouble),
}

/// What one thread has counted.
#[derive(Default)]
pub struct Counts {
    outcomes: [Counter; Outcome::ALL.len()],
    troubles: [Counter; Trouble::ALL.len()],
    refused: [Counter; Refused::ALL.len()],
    open: Counter,
}

impl Counts {
    /// Connections by what became of them.
    pub fn by_label(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let outcomes = Outcome::ALL.iter().zip(&self.outcomes).map(|(each, count)| (each.label(), count.get()));
        let troubles = Trouble::ALL.iter().zip(&self.troubles).map(|(each, count)| (each.label(), count.get()));
        let refused = Refused::ALL.iter().zip(&self.refused).map(|(each, count)| (each.label(), count.get()));
        outcomes.chain(troubles).chain(refused)
    }

    /// Connections that are open.
    pub fn open(&self) -> u64 {
        self.open.get()
    }

    fn ended(&self, end: End) {
        match end {
            End::Answered(outcome) => self.outcomes[outcome as usize].add(1),
            End::Failed(trouble) => self.troubles[trouble as usize].add(1),
        }
    }
}

enum Command {
    Listen(usize, TcpListener, ServiceAt, Answer),
    Leave(usize, Answer),
    Forget(Answer),
}

/// All threads that answer NTS-KE.
pub struct KeThreads {
    threads: Threads<Command, Counts>,
    credentials: Arc<ArcSwap<Credentials>>,
}

impl KeThreads {
    /// Start so many, which wait for sockets and begin without a certificate. The limits are those of each.
    ///
    /// # Errors
    /// Those of the operating system when it gives no thread or no descriptor; limits that contradict themselves.
    pub fn start(count: usize, limits: &Limits, preference: &[AeadId], shared: &Arc<Shared>) -> io::Result<Self> {
        let none = Credentials::new(&[]).map_err(io::Error::other)?;
        let credentials = Arc::new(ArcSwap::from_pointee(none));
        let preference: Arc<[AeadId]> = preference.into();
        let threads = Threads::start(count, "ke", |poll, commands, counts| {
            let server = Server {
                poll,
                commands,
                counts,
                shared: shared.clone(),
                credentials: credentials.clone(),
                preference: preference.clone(),
                admission: limits.ke_admission().map_err(io::Error::other)?,
                began: Instant::now(),
                places: Vec::new(),
                connections: Vec::new(),
                free: Vec::new(),
                deadlines: BTreeSet::new(),
                services: HashMap::new(),
                room: vec![0; READ].into(),
                plaintext: Vec::new(),
            };
            Ok(move || server.run())
        })?;
        Ok(Self { threads, credentials })
    }

    /// For new connections; those under way are not touched.
    pub fn use_credentials(&self, credentials: Arc<Credentials>) {
        self.credentials.store(credentials);
    }

    /// Answer on listening stream sockets, one for each thread, until `leave` is told the same number.
    ///
    /// # Errors
    /// Those of the operating system, and when there are not as many sockets as threads; the sockets are closed then.
    pub fn listen(&self, number: usize, sockets: Vec<OwnedFd>, service: &ServiceAt) -> io::Result<()> {
        let ready = sockets.into_iter().map(listening).collect::<io::Result<Vec<_>>>()?;
        let listen = |listener, answer| Command::Listen(number, listener, service.clone(), answer);
        self.threads.hand_out(ready, listen, |answer| Command::Leave(number, answer))
    }

    /// Answer there no more; connections that came by these sockets go on. They are closed when this returns.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn leave(&self, number: usize) -> io::Result<()> {
        self.threads.tell(|answer| Command::Leave(number, answer))
    }

    /// Ask anew where NTP is served.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn forget_services(&self) -> io::Result<()> {
        self.threads.tell(Command::Forget)
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
    #[must_use]
    pub fn alive(&self) -> usize {
        self.threads.alive()
    }

    /// Answer no more. Returns when all threads have ended; connections under way are closed.
    pub fn close(&self) {
        self.threads.close();
    }
}

fn listening(descriptor: OwnedFd) -> io::Result<TcpListener> {
    let socket = Socket::from(descriptor);
    socket.set_nonblocking(true)?;
    // Connections inherit it. An answer is one write, but longer than a segment.
    socket.set_tcp_nodelay(true)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// Where connections come in; what they keep of it when it is left.
struct Origin {
    number: usize,
    service: ServiceAt,
}

/// One listening socket.
struct Place {
    listener: TcpListener,
    origin: Arc<Origin>,
    /// Whether connections may be waiting there.
    is_ready: bool,
    /// Until when it is left alone.
    paused: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The request is not whole.
    Talking,
    /// How it ended is known, and our last words are under way.
    Leaving,
    /// We have closed our side. Closing all of it over unread octets would reset our answer away on its way.
    Lingering,
}

struct Connection {
    stream: TcpStream,
    peer: IpAddr,
    origin: Arc<Origin>,
    keyring: Arc<Keyring>,
    channel: TlsChannel,
    ke: Option<KeServer>,
    stage: Stage,
    /// Octets in this stage, or since the beginning.
    received: usize,
    deadline: Instant,
}

/// What is known of a connection after a step.
enum Step {
    Wait,
    Over,
}

impl Connection {
    fn flush(&mut self) -> io::Result<bool> {
        self.channel.flush(&mut self.stream)
    }

    fn answer(&mut self, reply: &KeReply) -> End {
        self.channel.finish(&reply.octets);
        End::Answered(reply.outcome)
    }

    fn cut_short(&mut self) -> End {
        if self.channel.is_established() {
            self.answer(&KeReply::cut_short())
        } else {
            End::Failed(Trouble::ConnectionLost)
        }
    }

    fn time_out(&mut self) -> End {
        if self.channel.is_established() { self.answer(&KeReply::timeout()) } else { End::Failed(Trouble::TlsTimeout) }
    }

    /// Say what is to be said, then wait for the peer's close.
    fn leave(&mut self, room: &mut [u8]) -> Step {
        if self.stage == Stage::Leaving {
            match self.flush() {
                Ok(true) if self.stream.shutdown(Shutdown::Write).is_ok() => self.stage = Stage::Lingering,
                Ok(false) => return Step::Wait,
                _ => return Step::Over,
            }
            self.received = 0;
        }
        loop {
            match self.stream.read(room) {
                Ok(count @ 1..) if self.received + count <= MAX_RECEIVED => self.received += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Step::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Step::Over,
            }
        }
    }
}

/// The exporter of a session, and the host's randomness.
struct Session<'a>(&'a TlsChannel);

impl ke::Session for Session<'_> {
    fn export(&mut self, context: &[u8], key: &mut [u8]) -> Result<(), NoKeys> {
        self.0.export(context, key).map_err(|_| NoKeys)
    }

    fn random(&mut self, room: &mut [u8]) {
        rand::fill(room);
    }
}

/// Where it was asked, and by which names.
type ServiceKey = (usize, SocketAddr, Arc<[String]>);

/// What one thread does.
struct Server {
    poll: Poll,
    commands: Receiver<Command>,
    counts: Arc<Counts>,
    shared: Arc<Shared>,
    credentials: Arc<ArcSwap<Credentials>>,
    preference: Arc<[AeadId]>,
    admission: KeAdmission,
    /// What the times of `admission` are counted from.
    began: Instant,
    places: Vec<Option<Place>>,
    /// As many as there are slots, at most.
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    deadlines: BTreeSet<(Instant, usize)>,
    services: HashMap<ServiceKey, Arc<NtpService>>,
    room: Box<[u8]>,
    plaintext: Vec<u8>,
}

/// Tokens of connections are odd, those of places even.
const fn token(position: usize, is_connection: bool) -> Token {
    Token(2 * position + is_connection as usize)
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(4 * BATCH);
        loop {
            match self.poll.poll(&mut events, self.patience()) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                let Token(number) = event.token();
                if event.token() == WAKE {
                    if self.obey().is_break() {
                        return Ok(());
                    }
                } else if number % 2 == 1 {
                    self.proceed(number / 2, event.is_read_closed());
                } else if let Some(Some(place)) = self.places.get_mut(number / 2) {
                    place.is_ready = true;
                }
            }
            self.expire();
            for position in 0..self.places.len() {
                self.accept(position);
            }
        }
    }

    /// How long there is nothing to do unless something happens.
    fn patience(&self) -> Option<Duration> {
        let now = Instant::now();
        let places = self.places.iter().flatten().filter(|place| place.is_ready);
        let looks = places.map(|place| place.paused.unwrap_or(now));
        let deadline = self.deadlines.first().map(|(deadline, _)| *deadline);
        looks.chain(deadline).min().map(|next| next.saturating_duration_since(now))
    }

    fn obey(&mut self) -> ControlFlow<()> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Listen(number, listener, service, answer)) => {
                    let _ = answer.send(self.listen(number, listener, service));
                }
                Ok(Command::Leave(number, answer)) => {
                    for place in &mut self.places {
                        // To close it is to leave the event queue.
                        place.take_if(|place| place.origin.number == number);
                    }
                    let _ = answer.send(Ok(()));
                }
                Ok(Command::Forget(answer)) => {
                    self.services.clear();
                    let _ = answer.send(Ok(()));
                }
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn listen(&mut self, number: usize, mut listener: TcpListener, service: ServiceAt) -> io::Result<()> {
        let position = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.poll.registry().register(&mut listener, token(position, false), Interest::READABLE)?;
        let origin = Arc::new(Origin { number, service });
        // What came before is told by no event.
        self.places[position] = Some(Place { listener, origin, is_ready: true, paused: None });
        Ok(())
    }

    /// Accept one batch.
    fn accept(&mut self, position: usize) {
        let Some(Some(place)) = self.places.get_mut(position) else { return };
        let now = Instant::now();
        if !place.is_ready || place.paused.is_some_and(|end| now < end) {
            return;
        }
        place.paused = None;
        let origin = place.origin.clone();
        for _ in 0..BATCH {
            let Some(Some(place)) = self.places.get_mut(position) else { return };
            match place.listener.accept() {
                Ok((stream, peer)) => self.welcome(stream, peer.ip(), &origin, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    place.is_ready = false;
                    return;
                }
                Err(error) if error.raw_os_error().is_some_and(|number| OUT_OF_RESOURCES.contains(&number)) => {
                    place.paused = Some(now + PAUSE);
                    self.counts.ended(End::Failed(Trouble::NoDescriptor));
                    return;
                }
                // accept(2): errors of the network on that connection, which is gone.
                Err(_) => self.counts.ended(End::Failed(Trouble::AcceptError)),
            }
        }
    }

    /// Take a connection in, or refuse it.
    fn welcome(&mut self, stream: TcpStream, peer: IpAddr, origin: &Arc<Origin>, now: Instant) {
        let elapsed = i64::try_from((now - self.began).as_nanos()).unwrap_or(i64::MAX);
        if let Err(refused) = self.admission.take(peer, elapsed) {
            self.counts.refused[refused as usize].add(1);
            // A close that sends a reset: nothing is left to wait for in the kernel.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            return;
        }
        if self.begin(stream, peer, origin, now).is_err() {
            self.admission.slots.give_back(peer);
            self.counts.ended(End::Answered(Outcome::InternalError));
        }
        self.counts.open.set(self.admission.slots.taken() as u64);
    }

    fn begin(&mut self, mut stream: TcpStream, peer: IpAddr, origin: &Arc<Origin>, now: Instant) -> io::Result<()> {
        let channel =
            TlsChannel::new(self.credentials.load_full()).map_err(|_| io::Error::other("TLS has no settings"))?;
        let position = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut stream, token(position, true), interest) {
            self.free.push(position);
            return Err(error);
        }
        let deadline = now + DEADLINE;
        self.deadlines.insert((deadline, position));
        self.connections[position] = Some(Box::new(Connection {
            stream,
            peer,
            origin: origin.clone(),
            keyring: self.shared.keyring.load_full(),
            channel,
            ke: None,
            stage: Stage::Talking,
            received: 0,
            deadline,
        }));
        Ok(())
    }

    /// Take a connection as far as it goes. `is_closed`: the peer's end is among what waits to be read.
    fn proceed(&mut self, position: usize, is_closed: bool) {
        self.step(position, |server, connection| match connection.stage {
            Stage::Talking => server.talk(connection, is_closed),
            Stage::Leaving | Stage::Lingering => None,
        });
    }

    /// End what has had its time.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, position)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            let mut is_over = false;
            self.step(position, |_, connection| {
                is_over = connection.stage != Stage::Talking;
                (!is_over).then(|| connection.time_out())
            });
            if is_over {
                self.release(position);
            }
            self.deadlines.remove(&(deadline, position));
        }
    }

    /// Do something with a connection, which tells how it ended if it did, and see it off then.
    fn step(&mut self, position: usize, act: impl FnOnce(&mut Self, &mut Connection) -> Option<End>) {
        let Some(mut connection) = self.connections.get_mut(position).and_then(Option::take) else { return };
        // Whatever it is, it is our own fault, and one connection's.
        let done = catch_unwind(AssertUnwindSafe(|| self.see_off(position, &mut connection, act)));
        self.connections[position] = Some(connection);
        let step = done.unwrap_or_else(|_| {
            self.counts.ended(End::Answered(Outcome::InternalError));
            Step::Over
        });
        if matches!(step, Step::Over) {
            self.release(position);
        }
    }

    fn see_off(
        &mut self,
        position: usize,
        connection: &mut Connection,
        act: impl FnOnce(&mut Self, &mut Connection) -> Option<End>,
    ) -> Step {
        if let Some(end) = act(self, connection) {
            self.counts.ended(end);
            if matches!(end, End::Failed(Trouble::TlsTimeout | Trouble::ConnectionLost)) {
                // There is nothing that the peer would have to read yet.
                return Step::Over;
            }
            self.deadlines.remove(&(connection.deadline, position));
            connection.deadline = Instant::now() + LINGER;
            self.deadlines.insert((connection.deadline, position));
            connection.stage = Stage::Leaving;
            // Our last octets and the end of our side then leave in one segment; without it in two.
            let _ = SockRef::from(&connection.stream).set_tcp_cork(true);
        }
        match connection.stage {
            Stage::Talking => Step::Wait,
            Stage::Leaving | Stage::Lingering => connection.leave(&mut self.room),
        }
    }

    fn release(&mut self, position: usize) {
        if let Some(connection) = self.connections.get_mut(position).and_then(Option::take) {
            self.deadlines.remove(&(connection.deadline, position));
            self.admission.slots.give_back(connection.peer);
            self.counts.open.set(self.admission.slots.taken() as u64);
            self.free.push(position);
        }
    }

    /// Listen and answer until nothing more is there; how it ended, None while something is missing.
    fn talk(&mut self, connection: &mut Connection, is_closed: bool) -> Option<End> {
        let mut is_drained = false;
        loop {
            match connection.flush() {
                // What we said has to be on its way before more is heard.
                Ok(false) => return None,
                Ok(true) if is_drained => return None,
                Ok(true) => {}
                Err(_) => return Some(End::Failed(Trouble::ConnectionLost)),
            }
            let count = match connection.stream.read(&mut self.room) {
                Ok(0) => return Some(connection.cut_short()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Some(End::Failed(Trouble::ConnectionLost)),
            };
            connection.received += count;
            let most = if connection.channel.is_established() { MAX_RECEIVED } else { MAX_HELLO };
            if connection.received > most {
                return Some(End::Failed(Trouble::TooLong));
            }
            if let Some(end) = self.hear(connection, count) {
                return Some(end);
            }
            // epoll(7): then nothing is left, and more makes a new event. An end that is known makes none.
            is_drained = count < self.room.len() && !is_closed;
        }
    }

    /// Take in what has been read.
    fn hear(&mut self, connection: &mut Connection, count: usize) -> Option<End> {
        self.plaintext.clear();
        if connection.channel.receive(&self.room[..count], &mut self.plaintext).is_err() {
            return Some(End::Failed(Trouble::TlsFailed));
        }
        if !self.plaintext.is_empty() {
            if connection.ke.is_none() {
                let Some(service) = self.service(connection) else {
                    return Some(connection.answer(&KeReply::internal_error()));
                };
                let (keyring, preference) = (connection.keyring.clone(), self.preference.clone());
                connection.ke = Some(KeServer::new(KeTerms { keyring, service, preference }));
            }
            let ke = connection.ke.as_mut()?;
            if let Some(reply) = ke.receive(&self.plaintext, &mut Session(&connection.channel)) {
                return Some(connection.answer(&reply));
            }
        }
        connection.channel.is_closed_by_peer().then(|| connection.cut_short())
    }

    /// Where NTP is for this connection.
    fn service(&mut self, connection: &Connection) -> Option<Arc<NtpService>> {
        let local = connection.stream.local_addr().ok()?;
        let key = (connection.origin.number, local, connection.channel.host_names());
        if let Some(known) = self.services.get(&key) {
            return Some(known.clone());
        }
        let service = Arc::new((connection.origin.service)(&written(local), &key.2)?);
        if self.services.len() >= MAX_SERVICES {
            self.services.clear();
        }
        self.services.insert(key, service.clone());
        Some(service)
    }
}

/// A local address as Python writes it: one that means something on one network only comes with its interface.
fn written(local: SocketAddr) -> String {
    let address = ke::written(local.ip());
    match local {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            let index = v6.scope_id();
            format!("{address}%{}", interface(index).unwrap_or_else(|| index.to_string()))
        }
        _ => address,
    }
}

/// The name of a network interface.
fn interface(index: u32) -> Option<String> {
    let all = std::fs::read_dir("/sys/class/net").ok()?.filter_map(Result::ok);
    let mut named = all.filter(|entry| {
        let told = std::fs::read_to_string(entry.path().join("ifindex"));
        told.is_ok_and(|told| told.trim().parse() == Ok(index))
    });
    named.next()?.file_name().into_string().ok()
}
