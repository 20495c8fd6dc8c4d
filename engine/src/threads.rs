//! Threads that wait for events of the kernel and take commands; each has its own counters.

use std::io;
use std::mem;
use std::process;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use mio::{Poll, Token, Waker};

/// The event that says that there are commands, or that the thread is to end: then nobody can give any more.
pub const WAKE: Token = Token(usize::MAX);

/// Where a thread answers a command.
pub type Answer = Sender<io::Result<()>>;

struct Thread<Command, Counts> {
    waker: Waker,
    counts: Arc<Counts>,
    life: Mutex<Option<Life<Command>>>,
    /// Why it ended before it was told to.
    fault: Arc<OnceLock<io::Error>>,
}

/// What a thread has until it is closed.
struct Life<Command> {
    commands: Sender<Command>,
    handle: JoinHandle<()>,
}

impl<Command, Counts> Thread<Command, Counts> {
    /// Nobody waits while this is held, and nothing in it can fail half way.
    fn with_life<R>(&self, use_it: impl FnOnce(&mut Option<Life<Command>>) -> R) -> R {
        use_it(&mut self.life.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Some threads that do the same.
pub struct Threads<Command, Counts> {
    all: Vec<Thread<Command, Counts>>,
    process: u32,
}

/// Nobody answers any more: the thread has ended.
fn gone() -> io::Error {
    io::Error::other("a thread of the engine has ended")
}

impl<Command: Send + 'static, Counts: Default + Send + Sync + 'static> Threads<Command, Counts> {
    /// Start so many. `prepare` makes what each of them runs, of its event queue, its commands and its counters.
    ///
    /// # Errors
    /// Those of the operating system and of `prepare`; threads that began end again.
    pub fn start<Run: FnOnce() -> io::Result<()> + Send + 'static>(
        count: usize,
        name: &str,
        mut prepare: impl FnMut(Poll, Receiver<Command>, Arc<Counts>) -> io::Result<Run>,
    ) -> io::Result<Self> {
        let mut started = Self { all: Vec::with_capacity(count), process: process::id() };
        for number in 0..count {
            let poll = Poll::new()?;
            let waker = Waker::new(poll.registry(), WAKE)?;
            let (commands, orders) = channel();
            let counts = Arc::<Counts>::default();
            let run = prepare(poll, orders, counts.clone())?;
            let fault = Arc::<OnceLock<_>>::default();
            let why = fault.clone();
            let handle = std::thread::Builder::new().name(format!("{name}-{number}")).spawn(move || {
                if let Err(error) = run() {
                    let _ = why.set(error);
                }
            })?;
            started.all.push(Thread { waker, counts, life: Mutex::new(Some(Life { commands, handle })), fault });
        }
        Ok(started)
    }
}

impl<Command, Counts> Threads<Command, Counts> {
    /// Give each thread one command, and wait until all have answered.
    ///
    /// # Errors
    /// The first that a thread answers; that a thread has ended.
    pub fn tell(&self, mut command: impl FnMut(Answer) -> Command) -> io::Result<()> {
        if !self.are_ours() {
            return Err(gone());
        }
        let (answer, answers) = channel();
        for thread in &self.all {
            let command = command(answer.clone());
            thread
                .with_life(|life| life.as_ref().and_then(|life| life.commands.send(command).ok()))
                .ok_or_else(gone)?;
            thread.waker.wake()?;
        }
        drop(answer);
        let mut all = Ok(());
        for _ in &self.all {
            all = all.and(answers.recv().map_err(|_| gone())?);
        }
        all
    }

    /// Give each thread one of these, all or none; `leave` is told to all when one cannot take its own.
    ///
    /// # Errors
    /// As `tell`, and when there are not as many as threads.
    pub fn hand_out<T>(
        &self,
        given: Vec<T>,
        mut listen: impl FnMut(T, Answer) -> Command,
        leave: impl Fn(Answer) -> Command,
    ) -> io::Result<()> {
        if given.len() != self.all.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a socket for each thread"));
        }
        let mut given = given.into_iter();
        let done = self.tell(|answer| match given.next() {
            Some(each) => listen(each, answer),
            None => leave(answer),
        });
        if done.is_err() {
            let _ = self.tell(leave);
        }
        done
    }

    /// How many live.
    #[must_use]
    pub fn alive(&self) -> usize {
        if !self.are_ours() {
            return 0;
        }
        let is_alive = |life: &mut Option<Life<_>>| life.as_ref().is_some_and(|life| !life.handle.is_finished());
        self.all.iter().filter(|thread| thread.with_life(is_alive)).count()
    }

    /// Why one has ended that was not told to; None as long as that is not known of any.
    pub fn fault(&self) -> Option<String> {
        self.all.iter().find_map(|thread| thread.fault.get()).map(ToString::to_string)
    }

    /// A child of fork(2) has none of its parent's threads, and nobody to wait for.
    fn are_ours(&self) -> bool {
        process::id() == self.process
    }

    /// What each has counted.
    pub fn counts(&self) -> impl Iterator<Item = &Counts> {
        self.all.iter().map(|thread| &*thread.counts)
    }

    /// Returns when all have ended.
    pub fn close(&self) {
        if !self.are_ours() {
            self.all.iter().for_each(|thread| mem::forget(thread.with_life(Option::take)));
            return;
        }
        let ended: Vec<_> = self.all.iter().map(|thread| (thread, thread.with_life(Option::take))).collect();
        let handles: Vec<_> = ended
            .into_iter()
            .filter_map(|(thread, life)| {
                let Life { commands, handle } = life?;
                drop(commands);
                // What cannot be woken up ends by its next event.
                let _ = thread.waker.wake();
                Some(handle)
            })
            .collect();
        for handle in handles {
            let _ = handle.join();
        }
    }
}

impl<Command, Counts> Drop for Threads<Command, Counts> {
    fn drop(&mut self) {
        self.close();
    }
}
