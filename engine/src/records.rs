//! NTS-KE records (RFC 8915 section 4), as `nts_core.records` has them.
//!
//! ```text
//! |C|        Record Type          |          Body Length          | Body
//! ```
//!
//! A message ends with End of Message and nothing may follow it; no message is longer than its limit. Record types that
//! nobody assigned stay numbers.

use crate::packet::uint16;

/// A server MUST accept 1,024 octets (section 4); chrony takes 16 KiB, and so do we.
pub const MAX_REQUEST: usize = 16 * 1024;
const CRITICAL: u16 = 0x8000;
const HEAD: usize = 4;

/// Assigned record types (section 7.6).
pub const END_OF_MESSAGE: u16 = 0;
/// Next Protocol Negotiation.
pub const NEXT_PROTOCOL: u16 = 1;
/// Error.
pub const ERROR: u16 = 2;
/// Warning.
pub const WARNING: u16 = 3;
/// AEAD Algorithm Negotiation.
pub const AEAD_ALGORITHM: u16 = 4;
/// New Cookie for `NTPv4`.
pub const NEW_COOKIE: u16 = 5;
/// `NTPv4` Server Negotiation.
pub const NTP_SERVER: u16 = 6;
/// `NTPv4` Port Negotiation.
pub const NTP_PORT: u16 = 7;
/// Empty: AES-128-GCM-SIV keys are exported as section 5.1 demands, and not as chrony 4.4 to 4.6 did.
pub const COMPLIANT_128GCM_EXPORT: u16 = 1024;

/// A message that is not well-formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireError;

/// One record; `kind` is a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its type.
    pub kind: u16,
    /// What it says.
    pub body: &'a [u8],
    /// Whether who does not know its type must refuse the message.
    pub critical: bool,
}

impl<'a> Record<'a> {
    /// One that must be understood.
    #[must_use]
    pub const fn critical(kind: u16, body: &'a [u8]) -> Self {
        Self { kind, body, critical: true }
    }

    /// One that may be passed over.
    #[must_use]
    pub const fn new(kind: u16, body: &'a [u8]) -> Self {
        Self { kind, body, critical: false }
    }

    /// Write it behind what is there. A body has 65,535 octets at most; ours are of a few hundred.
    pub fn write(&self, message: &mut Vec<u8>) {
        let body = &self.body[..self.body.len().min(usize::from(u16::MAX))];
        let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
        message.extend_from_slice(&(self.kind | if self.critical { CRITICAL } else { 0 }).to_be_bytes());
        message.extend_from_slice(&length.to_be_bytes());
        message.extend_from_slice(body);
    }

    /// The first record of these octets, and how long it is; None while octets are missing.
    fn read(octets: &'a [u8]) -> Option<(Self, usize)> {
        if octets.len() < HEAD {
            return None;
        }
        let (head, end) = (uint16(octets, 0), HEAD + usize::from(uint16(octets, 2)));
        let body = octets.get(HEAD..end)?;
        Some((Self { kind: head & !CRITICAL, body, critical: head & CRITICAL != 0 }, end))
    }
}

/// The numbers in a body that is a sequence of 16-bit integers; an error when a half is left over.
///
/// # Errors
/// `WireError`.
pub fn uint16_list(body: &[u8]) -> Result<impl Iterator<Item = u16> + Clone, WireError> {
    let (pairs, rest) = body.as_chunks::<2>();
    if rest.is_empty() { Ok(pairs.iter().map(|pair| u16::from_be_bytes(*pair))) } else { Err(WireError) }
}

/// Collects octets until a whole message is there; knows nothing of what the records mean.
#[derive(Debug)]
pub struct MessageReader {
    limit: usize,
    octets: Vec<u8>,
    /// How many octets are whole records.
    read: usize,
}

impl MessageReader {
    /// For one message of at most `limit` octets.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, octets: Vec::new(), read: 0 }
    }

    /// The records of the message without its End of Message, or None while octets are missing.
    ///
    /// # Errors
    /// When the limit is passed, when octets follow the end, or when End of Message has a body or lacks its critical
    /// bit (section 4.1.1).
    pub fn receive(&mut self, octets: &[u8]) -> Result<Option<impl Iterator<Item = Record<'_>>>, WireError> {
        if octets.len() > self.limit - self.octets.len() {
            return Err(WireError);
        }
        self.octets.extend_from_slice(octets);
        while let Some((record, length)) = Record::read(&self.octets[self.read..]) {
            if record.kind == END_OF_MESSAGE {
                if !record.critical || self.read + HEAD != self.octets.len() {
                    return Err(WireError);
                }
                return Ok(Some(Records(&self.octets[..self.read])));
            }
            self.read += length;
        }
        Ok(None)
    }
}

/// Records that stand one behind the other, whole.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let (record, length) = Record::read(self.0)?;
        self.0 = &self.0[length..];
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(records: &[Record]) -> Vec<u8> {
        let mut message = Vec::new();
        for record in records {
            record.write(&mut message);
        }
        message
    }

    fn is_refused(limit: usize, octets: &[u8]) -> bool {
        MessageReader::new(limit).receive(octets).is_err()
    }

    #[test]
    fn what_goes_in_comes_out_however_it_arrives() {
        let sent = [Record::critical(4, &[0, 15]), Record::new(5, b"x"), Record::new(0x7fff, &[])];
        let mut message = written(&sent);
        assert_eq!(message[..11], [0x80, 4, 0, 2, 0, 15, 0, 5, 0, 1, b'x']);
        Record::critical(END_OF_MESSAGE, &[]).write(&mut message);
        let mut whole = MessageReader::new(message.len());
        assert!(whole.receive(&message).unwrap().unwrap().eq(sent));
        let mut reader = MessageReader::new(message.len());
        let (last, before) = message.split_last().unwrap();
        for octet in before {
            assert!(reader.receive(&[*octet]).unwrap().is_none());
        }
        assert!(reader.receive(&[*last]).unwrap().unwrap().eq(sent));
    }

    #[test]
    fn messages_that_are_not_well_formed() {
        assert!(is_refused(100, &[0, 0, 0, 0]), "not critical");
        assert!(is_refused(100, &[0x80, 0, 0, 1, 0]), "a body");
        assert!(is_refused(100, &[0x80, 0, 0, 0, 0]), "something behind the end");
        assert!(!is_refused(4, &[0x80, 0, 0, 0]));
        assert!(is_refused(3, &[0x80, 0, 0, 0]), "longer than its limit");
        assert!(uint16_list(&[0, 1, 2]).is_err());
        assert!(uint16_list(&[0, 1, 2, 0]).unwrap().eq([1, 512]));
    }
}
