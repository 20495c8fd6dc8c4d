//! Several datagrams a system call: recvmmsg(2) and sendmmsg(2), which `std` does not have.
//!
//! This is the only module with `unsafe`: the two calls, the structures of C that they take, and descriptors that another
//! language hands over. Addresses and control
//! messages are octets here, read and written by safe code.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use crate::packet::MAX_DATAGRAM;

/// How many datagrams are taken at a time.
pub const BATCH: usize = 64;
/// How many answers a server that is behind sends together.
const FEW: usize = 8;
/// One octet more than is looked at: what is longer shows.
const LONGEST: usize = MAX_DATAGRAM + 1;
/// Octets of the longest address, `struct sockaddr_in6`.
const NAME: usize = mem::size_of::<libc::sockaddr_in6>();
/// Room for a `struct timespec` and a `struct in6_pktinfo` with their headers.
const CONTROL: usize = 128;
/// A `struct cmsghdr`: length (a word of the machine), level and kind.
const CONTROL_HEAD: usize = mem::size_of::<libc::cmsghdr>();
/// Room for one `struct in6_pktinfo` with its header.
const ORIGIN: usize = 40;

/// Where a datagram came from: `struct sockaddr_in` or `sockaddr_in6`.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Name([u8; NAME]);

/// Control messages, each aligned to a word.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// The address that a datagram was sent to, as the control message that makes the answer leave from there.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Origin {
    control: [u8; ORIGIN],
    length: usize,
}

/// A datagram of the last batch.
pub struct Datagram<'a> {
    pub octets: &'a [u8],
    pub peer: &'a Name,
    /// When the kernel got it, in Unix nanoseconds; None if it does not say.
    pub received: Option<i64>,
    /// On a socket that asks for it (`IP_PKTINFO`).
    pub origin: Option<Origin>,
}

/// An answer on its way out.
pub struct Letter<'a> {
    pub octets: &'a [u8],
    pub peer: &'a Name,
    pub origin: Option<&'a Origin>,
}

impl Name {
    /// The IP address, without the port.
    pub fn address(&self) -> IpAddr {
        let family = u16::from_ne_bytes([self.0[0], self.0[1]]);
        if i32::from(family) == libc::AF_INET6 {
            let mut octets = [0; 16];
            octets.copy_from_slice(&self.0[8..24]);
            IpAddr::from(octets)
        } else {
            let mut octets = [0; 4];
            octets.copy_from_slice(&self.0[4..8]);
            IpAddr::from(octets)
        }
    }

    fn length(&self) -> u32 {
        let family = u16::from_ne_bytes([self.0[0], self.0[1]]);
        let length = if i32::from(family) == libc::AF_INET6 { NAME } else { mem::size_of::<libc::sockaddr_in>() };
        u32::try_from(length).unwrap_or(0)
    }
}

/// Room for one batch of datagrams. It belongs to one thread.
pub struct Inbox {
    octets: Box<[[u8; LONGEST]]>,
    names: Box<[Name]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    /// How many headers the last call may have written to. Who is asked once in a while finds what it touches cold.
    used: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Inbox {
    pub fn new() -> Self {
        let mut octets = vec![[0; LONGEST]; BATCH].into_boxed_slice();
        let vectors = octets
            .iter_mut()
            .map(|room| libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: LONGEST })
            .collect();
        // SAFETY: `mmsghdr` is a structure of C of integers and pointers, for all of which zero is a value.
        let headers = (0..BATCH).map(|_| unsafe { mem::zeroed() }).collect();
        Self {
            octets,
            names: vec![Name([0; NAME]); BATCH].into_boxed_slice(),
            controls: vec![Control([0; CONTROL]); BATCH].into_boxed_slice(),
            vectors,
            headers,
            used: BATCH,
        }
    }

    /// Take what is there now, `BATCH` datagrams at most; how many these are.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing, else a queued error of the socket.
    pub fn receive(&mut self, socket: BorrowedFd) -> io::Result<usize> {
        for (position, header) in self.headers[..self.used].iter_mut().enumerate() {
            let header = &mut header.msg_hdr;
            header.msg_name = self.names[position].0.as_mut_ptr().cast();
            header.msg_namelen = u32::try_from(NAME).unwrap_or(0);
            header.msg_iov = &raw mut self.vectors[position];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[position].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
        }
        // SAFETY: all `BATCH` headers were set by the first call, and those that the kernel has written to since were
        // set again just now. Each names one element of `names`, `vectors` and `controls` with its true length, and each
        // vector one element of `octets`; none of these boxes is ever replaced, and `self` is borrowed for as long as
        // the call writes there. The descriptor is open while it is borrowed.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                u32::try_from(BATCH).unwrap_or(0),
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let done = usize::try_from(count).map_err(|_| io::Error::last_os_error());
        // One more than it counts: the kernel may have begun with it when it failed.
        self.used = done.as_ref().map_or(BATCH, |count| BATCH.min(count + 1));
        done
    }

    /// One datagram of those that the last `receive` counted.
    pub fn datagram(&self, position: usize) -> Datagram<'_> {
        let header = &self.headers[position];
        let length = (header.msg_len as usize).min(LONGEST);
        let filled = header.msg_hdr.msg_controllen.min(CONTROL);
        let (received, origin) = read_control(&self.controls[position].0[..filled]);
        Datagram { octets: &self.octets[position][..length], peer: &self.names[position], received, origin }
    }
}

/// Send these in one call after the other until each was sent or refused; how many were refused.
pub fn send(socket: BorrowedFd, letters: &[Letter<'_>]) -> usize {
    match letters.len() {
        0 => 0,
        1 => send_at_once::<1>(socket, letters),
        2..=FEW => send_at_once::<FEW>(socket, letters),
        _ => letters.chunks(BATCH).map(|letters| send_at_once::<BATCH>(socket, letters)).sum(),
    }
}

/// The same of `MOST` letters at most, with room for no more of them.
fn send_at_once<const MOST: usize>(socket: BorrowedFd, letters: &[Letter<'_>]) -> usize {
    // SAFETY: as in `Inbox::new`; zero vectors and headers name nothing.
    let mut vectors: [libc::iovec; MOST] = unsafe { mem::zeroed() };
    // SAFETY: the same.
    let mut headers: [libc::mmsghdr; MOST] = unsafe { mem::zeroed() };
    for ((letter, vector), header) in letters.iter().zip(&mut vectors).zip(&mut headers) {
        *vector = libc::iovec { iov_base: letter.octets.as_ptr().cast_mut().cast(), iov_len: letter.octets.len() };
        let header = &mut header.msg_hdr;
        header.msg_name = letter.peer.0.as_ptr().cast_mut().cast();
        header.msg_namelen = letter.peer.length();
        header.msg_iov = vector;
        header.msg_iovlen = 1;
        if let Some(origin) = letter.origin {
            header.msg_control = origin.control.as_ptr().cast_mut().cast();
            header.msg_controllen = origin.length as _;
        }
    }
    let (mut refused, mut done) = (0, 0);
    while done < letters.len() {
        let rest = &mut headers[done..letters.len()];
        // SAFETY: the headers of `rest` were set above. Each names octets, an address and perhaps control messages
        // that are borrowed by `letters`, and a vector on this stack frame, all with their true lengths.
        // sendmmsg(2) writes to the headers alone, in spite of the pointers' types.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                rest.as_mut_ptr(),
                u32::try_from(rest.len()).unwrap_or(0),
                libc::MSG_DONTWAIT as _,
            )
        };
        let sent = usize::try_from(sent).unwrap_or(0);
        // The first of those that are left is refused, and none but that.
        refused += usize::from(sent == 0);
        done += sent.max(1);
    }
    refused
}

/// Become the owner of a descriptor that was handed over.
///
/// # Errors
/// When it is not open.
pub(crate) fn take_over(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) with F_GETFD takes no pointer, and fails for a number that is no descriptor.
    if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and whoever hands it over has detached it: nobody else will close it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The time in a `SCM_TIMESTAMPNS` message, and what answers an `IP_PKTINFO` or `IPV6_PKTINFO` message.
fn read_control(octets: &[u8]) -> (Option<i64>, Option<Origin>) {
    let (mut received, mut origin) = (None, None);
    let mut rest = octets;
    while rest.len() >= CONTROL_HEAD {
        let length = usize::from_ne_bytes(word(rest, 0)).min(rest.len());
        if length < CONTROL_HEAD {
            break;
        }
        let data = &rest[CONTROL_HEAD..length];
        match (i32::from_ne_bytes(word(rest, 8)), i32::from_ne_bytes(word(rest, 12))) {
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) if data.len() >= 16 => {
                let (seconds, nanoseconds) = (i64::from_ne_bytes(word(data, 0)), i64::from_ne_bytes(word(data, 8)));
                received = Some(seconds * 1_000_000_000 + nanoseconds);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) if data.len() >= 12 => {
                // `struct in_pktinfo`: interface, local address (the source of what is sent), destination of the header.
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&data[4..8]);
                origin = Some(Origin::new(libc::IPPROTO_IP, libc::IP_PKTINFO, &info));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if data.len() >= 20 => {
                origin = Some(Origin::new(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &data[..20]));
            }
            _ => {}
        }
        rest = &rest[length.next_multiple_of(8).min(rest.len())..];
    }
    (received, origin)
}

impl Origin {
    fn new(level: i32, kind: i32, data: &[u8]) -> Self {
        let mut control = [0; ORIGIN];
        let length = CONTROL_HEAD + data.len();
        control[..8].copy_from_slice(&length.to_ne_bytes());
        control[8..12].copy_from_slice(&level.to_ne_bytes());
        control[12..16].copy_from_slice(&kind.to_ne_bytes());
        control[CONTROL_HEAD..length].copy_from_slice(data);
        Self { control, length: length.next_multiple_of(8) }
    }
}

fn word<const N: usize>(octets: &[u8], at: usize) -> [u8; N] {
    let mut found = [0; N];
    found.copy_from_slice(&octets[at..at + N]);
    found
}

// What is written for a machine with words of eight octets is not run on another.
const _: () = assert!(mem::size_of::<usize>() == 8 && CONTROL_HEAD == 16);

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn batches_go_both_ways() {
        let (server, client) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        client.connect(server.local_addr().unwrap()).unwrap();
        let mut inbox = Inbox::new();
        assert_eq!(inbox.receive(server.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        for number in 0..70_u8 {
            client.send(&vec![number; 40 + usize::from(number)]).unwrap();
        }
        assert_eq!(inbox.receive(server.as_fd()).unwrap(), BATCH);
        let datagrams: Vec<_> = (0..BATCH).map(|position| inbox.datagram(position)).collect();
        for (number, datagram) in datagrams.iter().enumerate() {
            assert_eq!(datagram.octets.len(), 40 + number);
            assert_eq!(datagram.peer.address(), client.local_addr().unwrap().ip());
            assert!(datagram.received.is_none() && datagram.origin.is_none());
        }
        let letters: Vec<_> =
            datagrams.iter().map(|each| Letter { octets: each.octets, peer: each.peer, origin: None }).collect();
        assert_eq!(send(server.as_fd(), &letters), 0);
        let mut room = [0; 2048];
        assert_eq!(client.recv(&mut room).unwrap(), 40);
        assert_eq!(inbox.receive(server.as_fd()).unwrap(), 6);
    }

    #[test]
    fn what_is_longer_than_is_looked_at_shows() {
        let (server, client) = (UdpSocket::bind("[::1]:0").unwrap(), UdpSocket::bind("[::1]:0").unwrap());
        client.send_to(&[0; 4000], server.local_addr().unwrap()).unwrap();
        let mut inbox = Inbox::new();
        assert_eq!(inbox.receive(server.as_fd()).unwrap(), 1);
        assert_eq!(inbox.datagram(0).octets.len(), LONGEST);
        assert_eq!(inbox.datagram(0).peer.address(), client.local_addr().unwrap().ip());
    }

    #[test]
    fn one_refused_letter_does_not_hold_the_others_up() {
        let (server, client) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        client.send_to(b"x", server.local_addr().unwrap()).unwrap();
        let mut inbox = Inbox::new();
        inbox.receive(server.as_fd()).unwrap();
        let good = inbox.datagram(0).peer;
        // Port 0 cannot be sent to.
        let mut bad = *good;
        bad.0[2..4].fill(0);
        let letters = [good, &bad, good].map(|peer| Letter { octets: b"y", peer, origin: None });
        assert_eq!(send(server.as_fd(), &letters), 1);
        let mut room = [0; 8];
        assert_eq!(client.recv(&mut room).unwrap() + client.recv(&mut room).unwrap(), 2);
    }

    #[test]
    fn garbage_in_control_messages_is_read_as_nothing() {
        for length in 0..CONTROL {
            for octet in [0, 1, 7, 15, 16, 17, 127, 255] {
                let (received, origin) = read_control(&vec![octet; length]);
                assert!(received.is_none() && origin.is_none());
            }
        }
    }
}
