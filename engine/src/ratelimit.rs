//! What one address may take of a server, as `nts_core.ratelimit` says: token buckets, access lists, slots for
//! connections.
//!
//! Nothing here knows of ports: whoever asks can choose those. An IPv4 address counts alone. IPv6 counts by /64 and,
//! with a wider budget, by /48. `now` is nanoseconds of a clock that never goes back.
//!
//! The table of token buckets has a fixed size and is allocated once. Rules for when it is full:
//!
//! 1. An address that the table does not hold has all its tokens: at worst the limits are lost, never the service.
//! 2. The bucket that is nearest to being full is forgotten first.
//! 3. No step looks at more than sixteen entries.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hasher as _;
use std::net::IpAddr;
use std::str::FromStr;

use siphasher::sip::SipHasher13;

/// Addresses and prefixes remembered by one limiter; 1.1 MB.
pub const TABLE_ENTRIES: usize = 65_536;
/// A /48 has 256 prefixes of length 56, which is what many providers give to a home.
pub const WIDE_FACTOR: i64 = 256;
const WAYS: usize = 16;
const SECOND: i64 = 1_000_000_000;
/// An address gets one `KoD` in half a minute, and no more for asking faster.
const KISS_INTERVAL: i64 = 32 * SECOND;
const KISS_ENTRIES: usize = 4096;
/// Datagrams come evenly: at once as many as the cap allows in so many seconds.
const NTP_AT_ONCE: f64 = 0.2;
/// Connections come in bursts.
const KE_AT_ONCE: f64 = 6.0;

/// Limits of one thread, as `member_agent.config.Limits` has them, in plain numbers. Times are nanoseconds.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Prefixes to serve; with any, only these.
    pub allow: Vec<Prefix>,
    /// Prefixes not to serve; the longest prefix decides.
    pub deny: Vec<Prefix>,
    /// Whether NTP tells those who are denied so (`KoD` DENY).
    pub kiss_denied: bool,
    /// Between requests of an address, on average.
    pub ntp_interval_ns: Option<i64>,
    /// Requests at once.
    pub ntp_burst: u32,
    /// Of what is over the limit, one in so many is answered.
    pub ntp_leak: u32,
    /// And one in so many gets `KoD` RATE; 0 is none.
    pub ntp_kod: u32,
    /// Cap: requests a second to answer, of all clients together.
    pub ntp_pps: Option<f64>,
    /// Whether requests above the cap get `KoD` RATE.
    pub kiss_above: bool,
    /// Connections open at a time.
    pub ke_connections: usize,
    /// Of an IPv4 address or an IPv6 /64.
    pub ke_per_address: usize,
    /// Of an IPv6 /48.
    pub ke_per_prefix: usize,
    /// Between connections of an address, on average.
    pub ke_interval_ns: Option<i64>,
    /// Connections at once.
    pub ke_burst: u32,
    /// Cap: connections a second, of all clients together.
    pub ke_per_second: Option<f64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            kiss_denied: false,
            ntp_interval_ns: None,
            ntp_burst: 8,
            ntp_leak: 4,
            ntp_kod: 0,
            ntp_pps: None,
            kiss_above: false,
            ke_connections: 1024,
            ke_per_address: 128,
            ke_per_prefix: 256,
            ke_interval_ns: None,
            ke_burst: 16,
            ke_per_second: None,
        }
    }
}

impl Limits {
    /// None when everybody is served.
    ///
    /// # Errors
    /// A prefix that is both allowed and denied.
    pub fn access(&self) -> Result<Option<AccessList>, Contradiction> {
        let is_open = self.allow.is_empty() && self.deny.is_empty();
        if is_open { Ok(None) } else { AccessList::new(&self.allow, &self.deny).map(Some) }
    }

    /// The rule for datagrams; None when every one is to be answered, which then costs nothing to find out.
    ///
    /// # Errors
    /// A prefix that is both allowed and denied.
    pub fn admission(&self, draw: Draw) -> Result<Option<Admission>, Contradiction> {
        let access = self.access()?;
        if access.is_none() && self.ntp_interval_ns.is_none() && self.ntp_pps.is_none() {
            return Ok(None);
        }
        let rate = self.ntp_interval_ns.map(|interval_ns| RatePolicy {
            interval_ns,
            burst: self.ntp_burst,
            leak: self.ntp_leak,
            kiss: self.ntp_kod,
        });
        let cap = || self.ntp_pps.map(|pps| Cap::new(pps, NTP_AT_ONCE));
        Ok(Some(Admission {
            draw,
            access,
            limiter: rate.map(|rate| RateLimiter::new(rate.interval_ns, rate.burst, rand::random(), TABLE_ENTRIES)),
            rate: rate.unwrap_or(RatePolicy { interval_ns: 0, burst: 1, leak: 1, kiss: 0 }),
            cap: cap(),
            // A KoD costs what an answer costs: no more of them than of those.
            kisses_above: if self.kiss_above { cap() } else { None },
            kiss_denied: self.kiss_denied,
            kisses: RateLimiter::new(KISS_INTERVAL, 1, rand::random(), KISS_ENTRIES),
        }))
    }

    /// The rule for connections, but for their slots.
    ///
    /// # Errors
    /// A prefix that is both allowed and denied.
    pub fn ke_admission(&self) -> Result<KeAdmission, Contradiction> {
        Ok(KeAdmission {
            access: self.access()?,
            limiter: self
                .ke_interval_ns
                .map(|interval_ns| RateLimiter::new(interval_ns, self.ke_burst, rand::random(), TABLE_ENTRIES)),
            slots: Slots::new(self.ke_connections, self.ke_per_address, self.ke_per_prefix),
            cap: self.ke_per_second.map(|per_second| Cap::new(per_second, KE_AT_ONCE)),
        })
    }
}

/// Random numbers of 32 bits.
pub type Draw = Box<dyn FnMut() -> u32 + Send>;

/// What an address counts towards: the number of its octets tells addresses and prefixes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Group {
    octets: u8,
    number: u64,
}

impl Group {
    /// The address itself for IPv4, its /64 for IPv6; and of the latter its /48.
    #[inline]
    fn of(address: IpAddr) -> (Self, Option<Self>) {
        match address {
            IpAddr::V4(address) => (Self { octets: 4, number: address.to_bits().into() }, None),
            IpAddr::V6(address) => {
                #[allow(clippy::cast_possible_truncation)] // these are the upper 64 bits
                let number = (address.to_bits() >> 64) as u64;
                (Self { octets: 8, number }, Some(Self { octets: 6, number: number >> 16 }))
            }
        }
    }
}

/// One request in `interval_ns` on average, `burst` at once.
///
/// Of what is over the limit, one in `leak` is answered nevertheless, drawn by chance: otherwise a forger of somebody's
/// address could silence the server for that address. One in `kiss` gets `KoD` RATE; 0 is none.
#[derive(Clone, Copy, Debug)]
struct RatePolicy {
    interval_ns: i64,
    burst: u32,
    leak: u32,
    kiss: u32,
}

/// Entries that share one place; those with no octets are free.
#[derive(Clone)]
struct Place {
    octets: [u8; WAYS],
    numbers: [u64; WAYS],
    full_at: [i64; WAYS],
}

impl Place {
    const EMPTY: Self = Self { octets: [0; WAYS], numbers: [0; WAYS], full_at: [i64::MIN; WAYS] };

    #[inline]
    fn find(&self, group: Group) -> Option<usize> {
        (0..WAYS).find(|&way| self.numbers[way] == group.number && self.octets[way] == group.octets)
    }

    #[inline]
    fn full_at(&self, group: Group, now: i64) -> i64 {
        self.find(group).map_or(now, |way| self.full_at[way].max(now))
    }

    /// Remember a bucket; whether another was forgotten before it was full. A free entry comes before all others.
    #[inline]
    fn put(&mut self, group: Group, full_at: i64, now: i64) -> bool {
        let nearest = || (0..WAYS).min_by_key(|&way| self.full_at[way]).unwrap_or(0);
        let (way, is_new) = self.find(group).map_or_else(|| (nearest(), true), |way| (way, false));
        let is_early = is_new && self.full_at[way] > now;
        self.octets[way] = group.octets;
        self.numbers[way] = group.number;
        self.full_at[way] = full_at;
        is_early
    }
}

/// Token buckets in bounded memory.
///
/// A bucket is one number, the time at which it will be full. It is empty when that is `burst` intervals away, and need
/// not be kept once it has passed. A request that is refused takes nothing: no debt can be run up in somebody else's
/// name.
pub struct RateLimiter {
    interval: i64,
    wide_interval: i64,
    capacity: i64,
    places: Box<[Place]>,
    /// Nobody can choose addresses that share a place without it.
    key: [u64; 2],
    /// How many buckets were forgotten before they were full: the table is too small for its traffic.
    pub forgotten: u64,
}

impl RateLimiter {
    /// `key` is random; `entries` are rounded up to a power of two, at least 16.
    pub fn new(interval_ns: i64, burst: u32, key: [u64; 2], entries: usize) -> Self {
        Self {
            interval: interval_ns,
            wide_interval: (interval_ns / WIDE_FACTOR).max(1),
            capacity: interval_ns.saturating_mul(burst.into()),
            places: vec![Place::EMPTY; entries.div_ceil(WAYS).next_power_of_two()].into(),
            key,
            forgotten: 0,
        }
    }

    /// Take a token from the bucket of the address, and of its /48; from both or, returning false, neither.
    #[inline]
    pub fn take(&mut self, address: IpAddr, now: i64) -> bool {
        let (own, wide) = Group::of(address);
        let place = self.place(own);
        let full_at = self.places[place].full_at(own, now).saturating_add(self.interval);
        if full_at.saturating_sub(now) > self.capacity {
            return false;
        }
        if let Some(wide) = wide {
            let place = self.place(wide);
            let full_at = self.places[place].full_at(wide, now).saturating_add(self.wide_interval);
            if full_at.saturating_sub(now) > self.capacity {
                return false;
            }
            self.forgotten += u64::from(self.places[place].put(wide, full_at, now));
        }
        self.forgotten += u64::from(self.places[place].put(own, full_at, now));
        true
    }

    #[inline]
    #[allow(clippy::cast_possible_truncation)] // the low bits are what is wanted
    fn place(&self, group: Group) -> usize {
        let mut hasher = SipHasher13::new_with_keys(self.key[0], self.key[1]);
        hasher.write_u64(group.number);
        hasher.write_u8(group.octets);
        hasher.finish() as usize & (self.places.len() - 1)
    }

    /// Buckets that are remembered.
    pub fn remembered(&self) -> usize {
        self.places.iter().map(|place| place.octets.iter().filter(|&&octets| octets != 0).count()).sum()
    }
}

/// So many requests a second of all clients together, and at once what comes in some seconds at that rate.
pub struct Cap {
    interval: i64,
    capacity: i64,
    full_at: i64,
}

impl Cap {
    /// `at_once` is seconds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // saturates; a second in nanoseconds is exact
    pub fn new(per_second: f64, at_once: f64) -> Self {
        let interval = ((SECOND as f64 / per_second).round_ties_even() as i64).max(1);
        let capacity = ((SECOND as f64 * at_once).round_ties_even() as i64).max(interval);
        Self { interval, capacity, full_at: 0 }
    }

    /// Take one, or, returning false, none.
    #[inline]
    pub fn take(&mut self, now: i64) -> bool {
        let full_at = self.full_at.max(now).saturating_add(self.interval);
        let is_within = full_at.saturating_sub(now) <= self.capacity;
        if is_within {
            self.full_at = full_at;
        }
        is_within
    }
}

/// A prefix of addresses, such as `192.0.2.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// A text that is no prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoPrefix(String);

impl fmt::Display for NoPrefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?} is not a prefix", self.0)
    }
}

impl std::error::Error for NoPrefix {}

impl FromStr for Prefix {
    type Err = NoPrefix;

    /// An address, a slash and a length, as `ipaddress` writes networks; no bit is set beyond the length.
    fn from_str(text: &str) -> Result<Self, NoPrefix> {
        let read = || {
            let (address, length) = text.split_once('/')?;
            let prefix = Self { address: address.parse().ok()?, length: length.parse().ok()? };
            let (number, width) = number(prefix.address);
            let beyond = width.checked_sub(prefix.length.into())?;
            (number.checked_shr(beyond).unwrap_or(0).checked_shl(beyond).unwrap_or(0) == number).then_some(prefix)
        };
        read().ok_or_else(|| NoPrefix(text.to_owned()))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.address, self.length)
    }
}

/// A prefix that is both allowed and denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction(Prefix);

impl fmt::Display for Contradiction {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} is both allowed and denied", self.0)
    }
}

impl std::error::Error for Contradiction {}

/// An address as a number, and how many bits it has.
#[inline]
fn number(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(address) => (address.to_bits().into(), u32::BITS),
        IpAddr::V6(address) => (address.to_bits(), u128::BITS),
    }
}

/// Prefixes of one length: how far an address is shifted to be found, and what becomes of it.
type Rules = (u32, HashMap<u128, bool>);

/// Prefixes that are allowed and denied; the longest that holds an address decides.
///
/// What no prefix holds is allowed, unless something is allowed by name: then it is denied, in both families. A look-up
/// costs one step for each length of prefix in use, however many prefixes there are.
#[derive(Debug)]
pub struct AccessList {
    v4: Vec<Rules>,
    v6: Vec<Rules>,
    otherwise: bool,
}

impl AccessList {
    /// From what is allowed and denied.
    ///
    /// # Errors
    /// A prefix that is both.
    pub fn new(allow: &[Prefix], deny: &[Prefix]) -> Result<Self, Contradiction> {
        let mut list = Self { v4: Vec::new(), v6: Vec::new(), otherwise: allow.is_empty() };
        let rules = allow.iter().map(|prefix| (prefix, true)).chain(deny.iter().map(|prefix| (prefix, false)));
        for (&prefix, is_allowed) in rules {
            let (number, width) = number(prefix.address);
            let shift = width - u32::from(prefix.length);
            let tables = if prefix.address.is_ipv4() { &mut list.v4 } else { &mut list.v6 };
            let at = tables.iter().position(|(known, _)| *known == shift).unwrap_or_else(|| {
                tables.push((shift, HashMap::new()));
                tables.len() - 1
            });
            let found = tables[at].1.entry(number.checked_shr(shift).unwrap_or(0)).or_insert(is_allowed);
            if *found != is_allowed {
                return Err(Contradiction(prefix));
            }
        }
        for tables in [&mut list.v4, &mut list.v6] {
            tables.sort_by_key(|(shift, _)| *shift);
        }
        Ok(list)
    }

    /// Whether an address is served.
    pub fn allows(&self, address: IpAddr) -> bool {
        let tables = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let (number, _) = number(address);
        let found = tables.iter().find_map(|(shift, table)| table.get(&number.checked_shr(*shift).unwrap_or(0)));
        found.copied().unwrap_or(self.otherwise)
    }
}

/// What to do with a datagram, by its source address alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Verdict {
    /// It is answered.
    Answer,
    /// It is dropped: its address asks too often.
    RateLimited,
    /// It is dropped: all together ask too often.
    OverCap,
    /// It is dropped: its address is not served.
    Denied,
    /// It gets `KoD` RATE.
    KissRate,
    /// It gets `KoD` DENY.
    KissDeny,
}

impl Verdict {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Answer, Self::RateLimited, Self::OverCap, Self::Denied, Self::KissRate, Self::KissDeny];

    /// As the Python engine writes it; of those that drop a datagram, the label of a counter.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::RateLimited => "rate-limited",
            Self::OverCap => "over-cap",
            Self::Denied => "denied",
            Self::KissRate => "kiss-rate",
            Self::KissDeny => "kiss-deny",
        }
    }
}

/// The whole rule for one datagram: first the access list, then the rate, then the cap on all traffic. Made by
/// `Limits::admission`.
pub struct Admission {
    draw: Draw,
    access: Option<AccessList>,
    limiter: Option<RateLimiter>,
    rate: RatePolicy,
    cap: Option<Cap>,
    kisses_above: Option<Cap>,
    kiss_denied: bool,
    kisses: RateLimiter,
}

impl Admission {
    /// Buckets that were forgotten before they were full.
    pub fn forgotten(&self) -> u64 {
        self.limiter.as_ref().map_or(0, |limiter| limiter.forgotten)
    }

    /// What to do with a datagram of this address.
    #[inline]
    pub fn judge(&mut self, address: IpAddr, now: i64) -> Verdict {
        let verdict = self.of_address(address, now);
        // What is dropped anyway takes nothing of what there is for others.
        if matches!(verdict, Verdict::RateLimited | Verdict::Denied) {
            return verdict;
        }
        let Some(cap) = &mut self.cap else { return verdict };
        if cap.take(now) {
            return verdict;
        }
        let Some(kisses_above) = &mut self.kisses_above else { return Verdict::OverCap };
        let may_kiss = self.kisses.take(address, now) && kisses_above.take(now);
        if may_kiss { Verdict::KissRate } else { Verdict::OverCap }
    }

    fn of_address(&mut self, address: IpAddr, now: i64) -> Verdict {
        if self.access.as_ref().is_some_and(|access| !access.allows(address)) {
            let is_told = self.kiss_denied && self.kisses.take(address, now);
            return if is_told { Verdict::KissDeny } else { Verdict::Denied };
        }
        if self.limiter.as_mut().is_none_or(|limiter| limiter.take(address, now)) {
            return Verdict::Answer;
        }
        self.over_limit(address, now)
    }

    fn over_limit(&mut self, address: IpAddr, now: i64) -> Verdict {
        let mut drawn = (self.draw)();
        if self.rate.kiss > 0 {
            if drawn.is_multiple_of(self.rate.kiss) {
                let is_told = self.kisses.take(address, now);
                return if is_told { Verdict::KissRate } else { Verdict::RateLimited };
            }
            drawn /= self.rate.kiss;
        }
        if drawn.is_multiple_of(self.rate.leak) { Verdict::Answer } else { Verdict::RateLimited }
    }
}

/// Why a connection is refused before anything is spent on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Refused {
    /// Its address is not served.
    Denied,
    /// Its address connects too often.
    RateLimited,
    /// All slots are taken.
    All,
    /// Its IPv4 address or IPv6 /64 holds its share of slots.
    OfAddress,
    /// Its /48 holds its share of slots.
    OfPrefix,
    /// All together connect too often.
    OverCap,
}

impl Refused {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Denied, Self::RateLimited, Self::All, Self::OfAddress, Self::OfPrefix, Self::OverCap];

    /// The label of a counter, as the Python engine has it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::RateLimited => "rate-limited",
            Self::All => "too-many-connections",
            Self::OfAddress => "too-many-of-address",
            Self::OfPrefix => "too-many-of-prefix",
            Self::OverCap => "over-cap",
        }
    }
}

/// A fixed number of slots, shared so that no few can take all.
///
/// An address (or /64) may hold `per_address`, a /48 `per_prefix`, and never more than a quarter, or half, of what is
/// free at the moment. So the fuller it gets the less each may have, and a newcomer finds a slot until about as many
/// prefixes hold slots as there are (dynamic thresholds, as in the buffers of switches).
pub struct Slots {
    total: usize,
    taken: usize,
    per_address: usize,
    per_prefix: usize,
    held: HashMap<Group, usize>,
}

impl Slots {
    /// All of them free.
    pub fn new(total: usize, per_address: usize, per_prefix: usize) -> Self {
        Self { total, taken: 0, per_address, per_prefix, held: HashMap::with_capacity(2 * total) }
    }

    /// Take a slot, to be given back.
    ///
    /// # Errors
    /// Why there is none.
    pub fn take(&mut self, address: IpAddr) -> Result<(), Refused> {
        let free = self.total.saturating_sub(self.taken);
        if free == 0 {
            return Err(Refused::All);
        }
        let (own, wide) = Group::of(address);
        if self.held(own) >= self.per_address.min((free / 4).max(1)) {
            return Err(Refused::OfAddress);
        }
        if wide.is_some_and(|wide| self.held(wide) >= self.per_prefix.min((free / 2).max(1))) {
            return Err(Refused::OfPrefix);
        }
        for group in [Some(own), wide].into_iter().flatten() {
            *self.held.entry(group).or_insert(0) += 1;
        }
        self.taken += 1;
        Ok(())
    }

    /// Of an address that has taken one.
    pub fn give_back(&mut self, address: IpAddr) {
        let (own, wide) = Group::of(address);
        self.taken = self.taken.saturating_sub(1);
        for group in [Some(own), wide].into_iter().flatten() {
            let left = self.held(group).saturating_sub(1);
            if left == 0 {
                self.held.remove(&group);
            } else {
                self.held.insert(group, left);
            }
        }
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    fn held(&self, group: Group) -> usize {
        self.held.get(&group).copied().unwrap_or(0)
    }
}

/// The whole rule for one connection, by its address: access list, rate, slots, and the cap on all. Made by
/// `Limits::ke_admission`.
pub struct KeAdmission {
    access: Option<AccessList>,
    limiter: Option<RateLimiter>,
    /// What connections hold, to be given back when they end.
    pub slots: Slots,
    cap: Option<Cap>,
}

impl KeAdmission {
    /// Take a slot for a connection.
    ///
    /// # Errors
    /// Why it gets none.
    pub fn take(&mut self, address: IpAddr, now: i64) -> Result<(), Refused> {
        if self.access.as_ref().is_some_and(|access| !access.allows(address)) {
            return Err(Refused::Denied);
        }
        if self.limiter.as_mut().is_some_and(|limiter| !limiter.take(address, now)) {
            return Err(Refused::RateLimited);
        }
        self.slots.take(address)?;
        if self.cap.as_mut().is_some_and(|cap| !cap.take(now)) {
            self.slots.give_back(address);
            return Err(Refused::OverCap);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const NOW: i64 = 1_000_000_000_000_000;
    const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1));

    fn limiter(burst: u32, entries: usize) -> RateLimiter {
        RateLimiter::new(SECOND, burst, rand::random(), entries)
    }

    fn taken(limiter: &mut RateLimiter, who: IpAddr, count: usize, now: i64) -> usize {
        (0..count).filter(|_| limiter.take(who, now)).count()
    }

    fn any_v4() -> IpAddr {
        Ipv4Addr::from_bits(rand::random()).into()
    }

    fn in_48(subnet: u16) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, subnet, 0, 0, 0, 0).into()
    }

    fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_burst_is_answered_then_one_request_an_interval() {
        for who in [V4, V6] {
            let mut limits = limiter(4, 1024);
            assert_eq!(taken(&mut limits, who, 10, NOW), 4);
            assert_eq!(taken(&mut limits, who, 10, NOW + SECOND - 1), 0);
            assert_eq!(taken(&mut limits, who, 10, NOW + SECOND), 1);
            assert_eq!(taken(&mut limits, who, 10, NOW + 3 * SECOND), 2);
            assert_eq!(taken(&mut limits, who, 10, NOW + 3600 * SECOND), 4);
        }
    }

    #[test]
    fn a_refused_request_runs_up_no_debt() {
        let mut limits = limiter(4, 1024);
        assert_eq!(taken(&mut limits, V4, 100_000, NOW), 4);
        assert_eq!(taken(&mut limits, V4, 10, NOW + 4 * SECOND), 4);
    }

    #[test]
    fn the_addresses_of_a_64_share_a_bucket_and_a_48_has_a_wider_one() {
        let mut limits = limiter(4, TABLE_ENTRIES);
        assert_eq!((0..100).filter(|end| limits.take(Ipv6Addr::from_bits(*end).into(), NOW)).count(), 4);
        let subnets = 0..4 * u16::try_from(WIDE_FACTOR).unwrap();
        let twice = subnets.clone().flat_map(|subnet| [subnet, subnet]);
        assert_eq!(twice.filter(|subnet| limits.take(in_48(*subnet), NOW)).count(), subnets.len());
        let later = subnets.filter(|subnet| limits.take(in_48(*subnet), NOW + SECOND)).count();
        assert!((255..=257).contains(&later));
        assert!(limits.take("2001:db8:1::1".parse().unwrap(), NOW), "the neighbour has its own");
    }

    #[test]
    fn a_64_at_its_limit_takes_nothing_from_its_48() {
        let mut limits = limiter(4, 1024);
        assert_eq!(taken(&mut limits, V6, 25_600, NOW), 4);
        assert!((2..200).all(|subnet| limits.take(in_48(subnet), NOW)));
    }

    #[test]
    fn families_do_not_mix() {
        let mut limits = limiter(1, 1024);
        assert!(limits.take(V4, NOW));
        assert!(limits.take("c000:201::".parse().unwrap(), NOW));
    }

    #[test]
    fn the_table_is_bounded_and_a_flood_takes_nothing_from_others() {
        let mut limits = limiter(4, 64);
        for step in 0..5000 {
            limits.take(any_v4(), NOW + step);
            assert!(limits.take(Ipv4Addr::from_bits(u32::try_from(step).unwrap()).into(), NOW + step));
        }
        assert_eq!(limits.remembered(), 64);
        assert!(limits.forgotten > 0);
    }

    #[test]
    fn who_is_at_the_limit_stays_there_through_a_flood() {
        let mut limits = limiter(8, 256);
        assert_eq!(taken(&mut limits, V4, 20, NOW), 8);
        for step in 0..16 * 256 {
            limits.take(any_v4(), NOW + step);
        }
        assert_eq!(taken(&mut limits, V4, 20, NOW + 16 * 256), 0);
    }

    #[test]
    fn buckets_that_are_full_again_are_not_missed() {
        let mut limits = limiter(4, 16);
        for number in 0..32 {
            let now = if number < 16 { NOW } else { NOW + 5 * SECOND };
            limits.take(Ipv4Addr::from_bits(number).into(), now);
        }
        assert_eq!((limits.remembered(), limits.forgotten), (16, 0));
        assert!(limits.take(V4, NOW + 5 * SECOND));
        assert_eq!((limits.remembered(), limits.forgotten), (16, 1));
    }

    #[test]
    fn places_depend_on_a_key() {
        let (first, second) = (limiter(4, TABLE_ENTRIES), limiter(4, TABLE_ENTRIES));
        let of_one_place = (0..u32::MAX)
            .map(|number| Group { octets: 4, number: number.into() })
            .filter(|group| first.place(*group) == 7)
            .take(17);
        assert!(of_one_place.map(|group| second.place(group)).collect::<HashSet<_>>().len() > 1);
    }

    #[test]
    fn the_longest_prefix_decides() {
        let list = AccessList::new(&prefixes(&["192.0.2.0/24", "2001:db8:1::/48"]), &prefixes(&["192.0.2.128/25"]));
        let list = list.unwrap();
        for (who, is_allowed) in [
            ("192.0.2.1", true),
            ("192.0.2.129", false),
            ("198.51.100.1", false),
            ("2001:db8:1::1", true),
            ("2001:db8::1", false),
        ] {
            assert_eq!(list.allows(who.parse().unwrap()), is_allowed, "{who}");
        }
        let list = AccessList::new(&[], &prefixes(&["0.0.0.0/0", "::/0"])).unwrap();
        assert!(!list.allows(V4) && !list.allows(V6));
        let list = AccessList::new(&[], &prefixes(&["192.0.2.1/32"])).unwrap();
        assert!(!list.allows(V4) && list.allows(V6));
    }

    #[test]
    fn a_prefix_cannot_be_both() {
        let both = prefixes(&["192.0.2.0/24"]);
        let said = AccessList::new(&both, &both).unwrap_err().to_string();
        assert_eq!(said, "192.0.2.0/24 is both allowed and denied");
    }

    #[test]
    fn texts_that_are_no_prefixes() {
        for text in ["", "192.0.2.1", "192.0.2.1/24", "192.0.2.0/33", "::1/64", "::/129", "192.0.2.0/", "name/3"] {
            assert_eq!(text.parse::<Prefix>(), Err(NoPrefix(text.to_owned())));
        }
        assert_eq!(prefixes(&["::/0", "2001:db8::/32"])[1].to_string(), "2001:db8::/32");
    }

    #[test]
    fn a_cap_allows_its_rate_and_a_little_at_once() {
        let mut cap = Cap::new(100.0, 0.2);
        let mut count = |now| (0..1000).filter(|_| cap.take(now)).count();
        assert_eq!([count(NOW), count(NOW), count(NOW + SECOND / 10), count(NOW + 60 * SECOND)], [20, 0, 10, 20]);
        let mut slow = Cap::new(0.001, 0.2);
        assert_eq!(
            [slow.take(NOW), slow.take(NOW + 999 * SECOND), slow.take(NOW + 1000 * SECOND)],
            [true, false, true]
        );
    }

    fn admission(limits: &Limits, drawn: &'static [u32]) -> Admission {
        let mut drawn = drawn.iter().cycle();
        limits.admission(Box::new(move || *drawn.next().unwrap())).unwrap().unwrap()
    }

    fn verdicts(admission: &mut Admission, who: IpAddr, count: usize) -> Vec<&'static str> {
        (0..count).map(|_| admission.judge(who, NOW).label()).collect()
    }

    #[test]
    fn nothing_to_judge_costs_nothing() {
        assert!(Limits::default().admission(Box::new(|| 0)).unwrap().is_none());
    }

    #[test]
    fn over_the_limit_some_are_answered_and_some_kissed() {
        let limits =
            Limits { ntp_interval_ns: Some(SECOND), ntp_burst: 2, ntp_leak: 4, ntp_kod: 2, ..Limits::default() };
        // Even numbers are kisses; of the others half of the number decides.
        let mut rule = admission(&limits, &[0, 1, 3, 9, 2]);
        let expected =
            ["answer", "answer", "kiss-rate", "answer", "rate-limited", "answer", "rate-limited", "rate-limited"];
        assert_eq!(verdicts(&mut rule, V4, 8), expected);
    }

    #[test]
    fn those_who_are_denied_are_told_so_once_in_half_a_minute() {
        let deny = prefixes(&["192.0.2.0/24"]);
        let mut rule = admission(&Limits { deny: deny.clone(), ..Limits::default() }, &[0]);
        assert_eq!(verdicts(&mut rule, V4, 2), ["denied", "denied"]);
        let mut rule = admission(&Limits { deny, kiss_denied: true, ..Limits::default() }, &[0]);
        assert_eq!(verdicts(&mut rule, V4, 2), ["kiss-deny", "denied"]);
        assert_eq!(rule.judge(V4, NOW + KISS_INTERVAL).label(), "kiss-deny");
        assert_eq!(rule.judge(V6, NOW).label(), "answer");
    }

    #[test]
    fn above_the_cap_nobody_or_some_are_told() {
        let limits = Limits { ntp_pps: Some(10.0), ..Limits::default() };
        assert_eq!(verdicts(&mut admission(&limits, &[0]), V4, 4), ["answer", "answer", "over-cap", "over-cap"]);
        let mut rule = admission(&Limits { kiss_above: true, ..limits }, &[0]);
        assert_eq!(verdicts(&mut rule, V4, 4), ["answer", "answer", "kiss-rate", "over-cap"]);
        assert_eq!(verdicts(&mut rule, V6, 2), ["kiss-rate", "over-cap"]);
        assert_eq!(verdicts(&mut rule, any_v4(), 1), ["over-cap"], "no more kisses than answers");
    }

    #[test]
    fn no_few_take_all_slots() {
        let mut slots = Slots::new(64, 128, 256);
        let of_one = (0..64).filter(|_| slots.take(V4).is_ok()).count();
        assert!(of_one < 16, "a quarter of what is free: {of_one}");
        assert_eq!(slots.take(V4), Err(Refused::OfAddress));
        let of_48 = (0..64).filter(|subnet| slots.take(in_48(*subnet)).is_ok()).count();
        assert!(of_48 < 32);
        assert_eq!(slots.take(in_48(99)), Err(Refused::OfPrefix));
        while slots.taken() < 64 {
            assert_eq!(slots.take(any_v4()), Ok(()), "a newcomer finds one");
        }
        assert_eq!(slots.take(any_v4()), Err(Refused::All));
        slots.give_back(V4);
        assert_eq!(slots.taken(), 63);
    }

    #[test]
    fn slots_that_are_given_back_leave_nothing_behind() {
        let mut slots = Slots::new(8, 4, 4);
        for who in [V4, V6] {
            slots.take(who).unwrap();
            slots.give_back(who);
        }
        assert_eq!((slots.taken(), slots.held.len()), (0, 0));
    }

    #[test]
    fn a_connection_over_the_cap_holds_no_slot() {
        let limits = Limits { ke_per_second: Some(0.5), deny: prefixes(&["::/0"]), ..Limits::default() };
        let mut rule = limits.ke_admission().unwrap();
        let outcomes: Vec<_> = (0..4).map(|_| rule.take(V4, NOW)).collect();
        assert_eq!(outcomes, [Ok(()), Ok(()), Ok(()), Err(Refused::OverCap)]);
        assert_eq!(rule.take(V6, NOW), Err(Refused::Denied));
        assert_eq!(rule.slots.taken(), 3);
        let limits = Limits { ke_interval_ns: Some(SECOND), ke_burst: 1, ..Limits::default() };
        let mut rule = limits.ke_admission().unwrap();
        assert_eq!([rule.take(V4, NOW), rule.take(V4, NOW)], [Ok(()), Err(Refused::RateLimited)]);
    }

    #[test]
    fn numbers_and_labels_belong_together() {
        assert!(Verdict::ALL.iter().enumerate().all(|(number, verdict)| *verdict as usize == number));
        assert!(Refused::ALL.iter().enumerate().all(|(number, refused)| *refused as usize == number));
    }
}
