//! Sends each datagram back to where it came from: what the way of a packet costs a server that does nothing else.
//!
//! Its socket is standard input: one that the bench has bound and prepared as the agent's are. It goes the way of
//! `nts_engine::ntp_server`, with as large batches, and is what that is measured against.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nts_engine::batch::{Inbox, Letter, send};

fn main() -> io::Result<()> {
    let socket = io::stdin();
    let mut poll = Poll::new()?;
    poll.registry().register(&mut SourceFd(&socket.as_raw_fd()), Token(0), Interest::READABLE)?;
    let mut events = Events::with_capacity(1);
    let mut inbox = Inbox::new();
    loop {
        poll.poll(&mut events, None)?;
        while let Ok(count) = inbox.receive(socket.as_fd()) {
            let datagrams: Vec<_> = (0..count).map(|place| inbox.datagram(place)).collect();
            let letters: Vec<_> = datagrams
                .iter()
                .map(|datagram| Letter {
                    octets: datagram.octets,
                    peer: datagram.peer,
                    origin: datagram.origin.as_ref(),
                })
                .collect();
            send(socket.as_fd(), &letters);
        }
    }
}
