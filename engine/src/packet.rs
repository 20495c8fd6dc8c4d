//! NTP packets and their extension fields (RFC 5905 section 7.3, RFC 7822, RFC 8915 section 5), as `nts_core.packet`
//! has them. Nothing is copied: what is found is told as places in the datagram.

use std::ops::Range;

/// Octets of the header that every packet begins with.
pub const HEADER: usize = 48;
/// The longest datagram that is looked at.
pub const MAX_DATAGRAM: usize = 2048;
/// RFC 7822 section 7.5.1.1: no field is shorter.
pub const MIN_FIELD: usize = 16;
/// Encrypted fields may be arbitrarily short (RFC 8915 section 5.6).
pub const MIN_HIDDEN_FIELD: usize = 4;
/// What a legacy MAC adds to the header: a key id and an MD5 or SHA-1 digest.
const LEGACY_MAC: [usize; 2] = [20, 24];

pub const UNIQUE_IDENTIFIER: u16 = 0x0104;
pub const COOKIE: u16 = 0x0204;
pub const COOKIE_PLACEHOLDER: u16 = 0x0304;
pub const AUTHENTICATOR: u16 = 0x0404;

/// Mode 3 is a client's, mode 4 a server's.
pub const CLIENT: u8 = 3;
const SERVER: u8 = 4;

/// Two octets of a buffer as a number.
#[inline]
#[must_use]
pub fn uint16(octets: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([octets[at], octets[at + 1]])
}

/// Whether the header is followed by nothing but a symmetric-key MAC, which we do not speak.
#[must_use]
pub fn has_legacy_mac(length: usize) -> bool {
    LEGACY_MAC.contains(&(length.wrapping_sub(HEADER)))
}

/// Octets up to the next multiple of four.
#[must_use]
pub const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// One extension field: its type, where it begins, and where its value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub kind: u16,
    pub start: usize,
    pub end: usize,
}

impl Field {
    /// Where its value is.
    #[must_use]
    pub fn value(&self) -> Range<usize> {
        self.start + 4..self.end
    }

    /// Where all of it is.
    #[must_use]
    pub fn whole(&self) -> Range<usize> {
        self.start..self.end
    }
}

/// The extension fields from a place to the end or up to an authenticator, which is then the last: what follows one is
/// not authentic, and not looked at (RFC 8915 section 5.7). An error ends them.
pub struct Fields<'a> {
    octets: &'a [u8],
    at: usize,
    shortest: usize,
}

impl<'a> Fields<'a> {
    #[must_use]
    pub fn new(octets: &'a [u8], start: usize, shortest: usize) -> Self {
        Self { octets, at: start, shortest }
    }
}

/// Octets that do not have the form their format requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl Iterator for Fields<'_> {
    type Item = Result<Field, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let (start, total) = (self.at, self.octets.len());
        if start >= total {
            return None;
        }
        self.at = total;
        if total - start < self.shortest {
            return Some(Err(Malformed));
        }
        let length = usize::from(uint16(self.octets, start + 2));
        let end = start + length;
        if length < self.shortest || length % 4 != 0 || end > total {
            return Some(Err(Malformed));
        }
        let kind = uint16(self.octets, start);
        if kind != AUTHENTICATOR {
            self.at = end;
        }
        Some(Ok(Field { kind, start, end }))
    }
}

/// The body of the NTS Authenticator and Encrypted Extension Fields field (RFC 8915 section 5.6): where nonce and
/// ciphertext are in the datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authenticator {
    pub nonce: Range<usize>,
    pub ciphertext: Range<usize>,
    end: usize,
}

impl Authenticator {
    /// Its two lengths have to fit the field, and a nonce may not be empty: no algorithm of ours takes one.
    ///
    /// # Errors
    /// `Malformed` when they do not.
    pub fn read(datagram: &[u8], field: &Field) -> Result<Self, Malformed> {
        let start = field.start + 4;
        if field.end < start + 4 {
            return Err(Malformed);
        }
        let (nonce, ciphertext) = (uint16(datagram, start).into(), uint16(datagram, start + 2).into());
        let begin = start + 4;
        let middle = begin + padded(nonce);
        if nonce == 0 || middle + padded(ciphertext) > field.end {
            return Err(Malformed);
        }
        Ok(Self { nonce: begin..begin + nonce, ciphertext: middle..middle + ciphertext, end: field.end })
    }

    /// Whether nonce and additional padding have room for a nonce of the server's, of so many octets (section 5.6).
    #[must_use]
    pub fn leaves_room(&self, nonce: usize) -> bool {
        self.end - self.nonce.start - padded(self.ciphertext.len()) >= nonce
    }

    /// Octets of a whole field for a nonce and a plaintext of these lengths.
    #[must_use]
    pub const fn length(nonce: usize, plaintext: usize) -> usize {
        8 + padded(nonce) + padded(plaintext + crate::siv::TAG)
    }
}

/// What the server says of its clock: short-format distances, a timestamp, four octets of reference id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockState {
    pub leap: u8,
    pub stratum: u8,
    pub precision: i8,
    pub root_delay: u32,
    pub root_dispersion: u32,
    pub reference_id: [u8; 4],
    pub reference: u64,
}

/// Of a request's header what the answer repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub version: u8,
    pub poll: u8,
    pub transmit: [u8; 8],
}

impl ClockState {
    /// No clock at all, and a kiss code where the reference id stands (RFC 5905 section 7.4).
    #[must_use]
    pub const fn kiss(code: [u8; 4]) -> Self {
        Self { leap: 3, stratum: 0, precision: 0, root_delay: 0, root_dispersion: 0, reference_id: code, reference: 0 }
    }

    /// Write the header that answers a request into the first octets of `room`.
    pub fn answer(&self, asked: &Asked, receive: [u8; 8], transmit: [u8; 8], room: &mut [u8]) {
        let room = &mut room[..HEADER];
        room[0] = self.leap << 6 | asked.version << 3 | SERVER;
        room[1] = self.stratum;
        room[2] = asked.poll;
        room[3] = self.precision.to_be_bytes()[0];
        room[4..8].copy_from_slice(&self.root_delay.to_be_bytes());
        room[8..12].copy_from_slice(&self.root_dispersion.to_be_bytes());
        room[12..16].copy_from_slice(&self.reference_id);
        room[16..24].copy_from_slice(&self.reference.to_be_bytes());
        room[24..32].copy_from_slice(&asked.transmit);
        room[32..40].copy_from_slice(&receive);
        room[40..48].copy_from_slice(&transmit);
    }
}
