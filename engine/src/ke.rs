//! Key establishment (RFC 8915 sections 4 and 5.1) without sockets: the server's side, as `nts_core.ke` has it.
//!
//! | request | answer |
//! |---|---|
//! | unknown critical record | Error 0 |
//! | malformed, missing, duplicate, misplaced | Error 1 |
//! | no protocol in common | empty Next Protocol record |
//! | no AEAD algorithm in common | empty AEAD record |
//! | silence until the deadline, or the end | Error 1 |
//! | anything, when we fail ourselves | Error 2 |

use std::net::IpAddr;
use std::sync::Arc;

use arrayvec::ArrayVec;
use zeroize::Zeroizing;

use crate::aead::{AeadId, LONGEST_KEY, SessionKeys};
use crate::cookies::{self, Keyring, MAX_COOKIES};
use crate::labels::labelled;
use crate::records::{self, MessageReader, Record, WireError, uint16_list};
use crate::siv;

const NTPV4: u16 = 0;
/// Where NTP is when nothing else is said.
pub const DEFAULT_NTP_PORT: u16 = 123;
const MAX_HOST_NAME: usize = 253;
const MAX_LABEL: usize = 63;

const UNRECOGNIZED_CRITICAL_RECORD: u16 = 0;
const BAD_REQUEST: u16 = 1;
const INTERNAL_SERVER_ERROR: u16 = 2;

labelled! {
    /// What became of a request; the label of a counter.
    pub enum Outcome {
        /// Cookies were given.
        Ok => "ok",
        /// It was malformed.
        BadRequest => "bad-request",
        /// It asks for other protocols than ours.
        NoProtocol => "no-protocol",
        /// It asks for other algorithms than ours.
        NoAead => "no-aead",
        /// It has a critical record that nobody knows.
        UnknownCritical => "unknown-critical",
        /// It did not come in time.
        Timeout => "timeout",
        /// It ended too early.
        CutShort => "cut-short",
        /// We failed by a fault of our own.
        InternalError => "internal-error",
    }
}

/// What to send before closing, and why.
#[derive(Debug)]
pub struct KeReply {
    /// A whole message.
    pub octets: Vec<u8>,
    /// For the counters.
    pub outcome: Outcome,
}

impl KeReply {
    fn new(outcome: Outcome, body: &[Record]) -> Self {
        let mut octets = Vec::new();
        for record in body {
            record.write(&mut octets);
        }
        Self::ended(outcome, octets)
    }

    fn ended(outcome: Outcome, mut octets: Vec<u8>) -> Self {
        Record::critical(records::END_OF_MESSAGE, &[]).write(&mut octets);
        Self { octets, outcome }
    }

    fn error(outcome: Outcome, code: u16) -> Self {
        Self::new(outcome, &[Record::critical(records::ERROR, &code.to_be_bytes())])
    }

    /// When the deadline passed before the request was whole (section 4.1.3).
    #[must_use]
    pub fn timeout() -> Self {
        Self::error(Outcome::Timeout, BAD_REQUEST)
    }

    /// When the client said that it sends no more before its request was whole.
    #[must_use]
    pub fn cut_short() -> Self {
        Self::error(Outcome::CutShort, BAD_REQUEST)
    }

    /// When we failed by a fault of our own (section 4.1.3).
    #[must_use]
    pub fn internal_error() -> Self {
        Self::error(Outcome::InternalError, INTERNAL_SERVER_ERROR)
    }
}

impl From<WireError> for KeReply {
    fn from(_: WireError) -> Self {
        Self::error(Outcome::BadRequest, BAD_REQUEST)
    }
}

/// Where NTP is served when it is not the KE server's address and port 123 (records 6 and 7).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NtpEndpoint {
    /// A host name, or an address as `written`.
    pub host: Option<String>,
    /// UDP port.
    pub port: u16,
}

impl Default for NtpEndpoint {
    fn default() -> Self {
        Self { host: None, port: DEFAULT_NTP_PORT }
    }
}

impl NtpEndpoint {
    fn tell(&self, message: &mut Vec<u8>) {
        // Critical, as chrony sends them: a client that ignored them would ask the wrong server.
        if let Some(host) = &self.host {
            Record::critical(records::NTP_SERVER, host.as_bytes()).write(message);
        }
        if self.port != DEFAULT_NTP_PORT {
            Record::critical(records::NTP_PORT, &self.port.to_be_bytes()).write(message);
        }
    }
}

/// Where NTP is served with our cookies: where clients are sent, and where else they may ask to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NtpService {
    /// Where clients are sent who ask for nothing.
    pub default: NtpEndpoint,
    /// Where they may ask to go.
    pub others: Vec<NtpEndpoint>,
}

impl NtpService {
    /// The endpoint that a client asks for by records 6 and 7, if it is one of ours (section 4.1.7).
    #[must_use]
    pub fn choose(&self, host: Option<&str>, port: Option<u16>) -> &NtpEndpoint {
        let is_wanted = |endpoint: &&NtpEndpoint| {
            (host.is_none() || host == endpoint.host.as_deref()) && port.is_none_or(|port| port == endpoint.port)
        };
        std::iter::once(&self.default).chain(&self.others).find(is_wanted).unwrap_or(&self.default)
    }
}

/// What a KE server gives: cookies of one keyring, for one service, under the algorithms it prefers, of which the first
/// that a client offers is chosen.
#[derive(Clone)]
pub struct KeTerms {
    /// It seals the cookies.
    pub keyring: Arc<Keyring>,
    /// Where they are good.
    pub service: Arc<NtpService>,
    /// AES-SIV-CMAC-256 has to be among them (section 5.1).
    pub preference: Arc<[AeadId]>,
}

/// The TLS session made no keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoKeys;

/// What the world gives to one session.
pub trait Session {
    /// Fill `key` with keying material under RFC 8915's label and this context (section 4.3).
    ///
    /// # Errors
    /// When TLS makes none.
    fn export(&mut self, context: &[u8], key: &mut [u8]) -> Result<(), NoKeys>;
    /// Fill `room` with randomness: the nonces of cookies.
    fn random(&mut self, room: &mut [u8]);
}

/// The server's side of one TLS session.
pub struct KeServer {
    terms: KeTerms,
    reader: MessageReader,
}

impl KeServer {
    /// For one request.
    #[must_use]
    pub const fn new(terms: KeTerms) -> Self {
        Self { terms, reader: MessageReader::new(records::MAX_REQUEST) }
    }

    /// The reply once the request is whole; None while octets are missing.
    pub fn receive(&mut self, plaintext: &[u8], session: &mut impl Session) -> Option<KeReply> {
        let request = match self.reader.receive(plaintext) {
            Ok(records) => Request::sort(records?),
            Err(error) => return Some(error.into()),
        };
        Some(request.and_then(|request| answer(&self.terms, &request, session)).unwrap_or_else(|refused| refused))
    }
}

fn answer(terms: &KeTerms, request: &Request, session: &mut impl Session) -> Result<KeReply, KeReply> {
    let protocols = uint16_list(request.protocols)?;
    if request.protocols.is_empty() {
        return Err(WireError.into());
    }
    if !protocols.clone().any(|protocol| protocol == NTPV4) {
        return Err(KeReply::new(Outcome::NoProtocol, &[Record::critical(records::NEXT_PROTOCOL, &[])]));
    }
    let algorithms = request.algorithms.filter(|body| !body.is_empty()).ok_or(WireError)?;
    let offered = uint16_list(algorithms)?;
    let protocol = Record::critical(records::NEXT_PROTOCOL, const { &NTPV4.to_be_bytes() });
    let Some(aead) = choose(&terms.preference, &offered, request.is_compliant) else {
        return Err(KeReply::new(Outcome::NoAead, &[protocol, Record::critical(records::AEAD_ALGORITHM, &[])]));
    };
    // AES-128-GCM-SIV without record 1024 means what chrony 4.4 to 4.6 do: keys in the name of AES-SIV-CMAC-256.
    let is_gcm_siv = aead == AeadId::Aes128GcmSiv;
    let named = if is_gcm_siv && !request.is_compliant { AeadId::SivCmac256 } else { aead };
    let keys = export_keys(session, aead, named).map_err(|NoKeys| KeReply::internal_error())?;
    let (host, port) = request.endpoint()?;

    let mut message = Vec::with_capacity(MAX_COOKIES * (4 + cookies::LONGEST));
    protocol.write(&mut message);
    Record::critical(records::AEAD_ALGORITHM, &[0, aead as u8]).write(&mut message);
    if is_gcm_siv && request.is_compliant {
        Record::new(records::COMPLIANT_128GCM_EXPORT, &[]).write(&mut message);
    }
    terms.service.choose(host.as_deref(), port).tell(&mut message);
    let mut nonces = [[0; cookies::NONCE]; MAX_COOKIES];
    session.random(nonces.as_flattened_mut());
    let (start, length) = (message.len(), cookies::length(aead));
    for _ in &nonces {
        Record::new(records::NEW_COOKIE, &[0; cookies::LONGEST][..length]).write(&mut message);
    }
    let mut jobs = ArrayVec::<_, MAX_COOKIES>::new();
    for (record, nonce) in message[start..].chunks_exact_mut(4 + length).zip(&nonces) {
        jobs.push(terms.keyring.sealing(&keys, nonce, &mut record[4..]));
    }
    siv::seal(&mut jobs);
    drop(jobs);
    Ok(KeReply::ended(Outcome::Ok, message))
}

/// The session keys (section 5.1): the context is protocol, algorithm, direction.
fn export_keys(session: &mut impl Session, aead: AeadId, named: AeadId) -> Result<SessionKeys, NoKeys> {
    let mut both = Zeroizing::new([0; 2 * LONGEST_KEY]);
    let both = &mut both[..2 * aead.key_length()];
    for (direction, key) in (0..).zip(both.chunks_exact_mut(aead.key_length())) {
        let [high, low] = NTPV4.to_be_bytes();
        session.export(&[high, low, 0, named as u8, direction], key)?;
    }
    SessionKeys::new(aead, both).ok_or(NoKeys)
}

/// The first of ours that is offered. AES-128-GCM-SIV without record 1024 comes last: only chrony 4.4 to 4.6 is sure to
/// mean by it what we then do.
fn choose(preference: &[AeadId], offered: &(impl Iterator<Item = u16> + Clone), is_compliant: bool) -> Option<AeadId> {
    let shared = || preference.iter().copied().filter(|&ours| offered.clone().any(|theirs| theirs == ours as u16));
    shared().find(|&aead| is_compliant || aead != AeadId::Aes128GcmSiv).or_else(|| shared().next())
}

/// What a request says, by record type.
struct Request<'a> {
    protocols: &'a [u8],
    algorithms: Option<&'a [u8]>,
    host: Option<&'a [u8]>,
    port: Option<&'a [u8]>,
    is_compliant: bool,
}

impl<'a> Request<'a> {
    fn sort(records: impl Iterator<Item = Record<'a>>) -> Result<Self, KeReply> {
        let [mut protocols, mut algorithms, mut host, mut port, mut compliant] = [None; 5];
        for record in records {
            let place = match record.kind {
                records::NEXT_PROTOCOL => &mut protocols,
                records::AEAD_ALGORITHM => &mut algorithms,
                records::NTP_SERVER => &mut host,
                records::NTP_PORT => &mut port,
                records::COMPLIANT_128GCM_EXPORT => &mut compliant,
                // A request must not carry others that are known (section 4.1).
                records::END_OF_MESSAGE | records::ERROR | records::WARNING | records::NEW_COOKIE => {
                    return Err(WireError.into());
                }
                _ if record.critical => {
                    return Err(KeReply::error(Outcome::UnknownCritical, UNRECOGNIZED_CRITICAL_RECORD));
                }
                _ => continue,
            };
            if place.replace(record.body).is_some() {
                return Err(WireError.into());
            }
        }
        if compliant.is_some_and(|body| !body.is_empty()) {
            return Err(WireError.into());
        }
        let protocols = protocols.ok_or(WireError)?;
        Ok(Self { protocols, algorithms, host, port, is_compliant: compliant.is_some() })
    }

    /// What records 6 and 7 name (sections 4.1.7 and 4.1.8).
    fn endpoint(&self) -> Result<(Option<String>, Option<u16>), WireError> {
        let port = match self.port {
            None => None,
            Some(&[high, low]) if [high, low] != [0, 0] => Some(u16::from_be_bytes([high, low])),
            Some(_) => return Err(WireError),
        };
        Ok((self.host.map(host_of).transpose()?, port))
    }
}

/// A host name without its last dot, or an address as Python's `ipaddress` writes it (section 4.1.7).
///
/// # Errors
/// What is neither, and addresses that are no host's or have a zone identifier.
pub fn host_of(body: &[u8]) -> Result<String, WireError> {
    let host = std::str::from_utf8(body).ok().filter(|host| host.is_ascii()).ok_or(WireError)?;
    if let Ok(address) = host.parse::<IpAddr>() {
        let is_of_a_host = !address.is_unspecified() && !address.is_multicast();
        return is_of_a_host.then(|| written(address)).ok_or(WireError);
    }
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    if is_host_name(&host) { Ok(host) } else { Err(WireError) }
}

/// An address as Python's `ipaddress` writes it: IPv6 addresses that stand for IPv4 ones have no dots.
#[must_use]
pub fn written(address: IpAddr) -> String {
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            let [.., high, low] = v6.segments();
            format!("::ffff:{high:x}:{low:x}")
        }
        _ => address.to_string(),
    }
}

/// Letters, digits and hyphens, and the underscore that hosts have in practice; a last label of digits would be taken
/// for an address.
fn is_host_name(host: &str) -> bool {
    let is_edge = |octet: u8| octet.is_ascii_lowercase() || octet.is_ascii_digit() || octet == b'_';
    let is_label = |label: &str| match label.as_bytes() {
        [] => false,
        [only] => is_edge(*only),
        [first, middle @ .., last] => {
            label.len() <= MAX_LABEL
                && is_edge(*first)
                && is_edge(*last)
                && middle.iter().all(|&octet| is_edge(octet) || octet == b'-')
        }
    };
    let last = host.rsplit('.').next().unwrap_or(host);
    host.len() <= MAX_HOST_NAME && host.split('.').all(is_label) && !last.bytes().all(|octet| octet.is_ascii_digit())
}

#[cfg(test)]
mod tests;
