//! Who gets in, by the address alone: the whole rule for datagrams and the whole rule for connections, of access lists,
//! token buckets, caps and slots, as `nts_core.ratelimit` and `member_agent.ke_server` have them.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::access::{AccessList, Contradiction, Prefix};
use crate::labels::labelled;
use crate::ratelimit::{Cap, Group, RateLimiter, SECOND, TABLE_ENTRIES};

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

/// Of tests: an agent gives all of its own.
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
    pub(crate) fn access(&self) -> Result<Option<AccessList>, Contradiction> {
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
    pub(crate) fn ke_admission(&self) -> Result<KeAdmission, Contradiction> {
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

labelled! {
    /// What to do with a datagram, by its source address alone.
    pub enum Verdict {
        /// It is answered.
        Answer => "answer",
        /// It is dropped: its address asks too often.
        RateLimited => "rate-limited",
        /// It is dropped: all together ask too often.
        OverCap => "over-cap",
        /// It is dropped: its address is not served.
        Denied => "denied",
        /// It gets `KoD` RATE.
        KissRate => "kiss-rate",
        /// It gets `KoD` DENY.
        KissDeny => "kiss-deny",
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

labelled! {
    /// Why a connection is refused before anything is spent on it.
    pub(crate) enum Refused {
        /// Its address is not served.
        Denied => "denied",
        /// Its address connects too often.
        RateLimited => "rate-limited",
        /// All slots are taken.
        All => "too-many-connections",
        /// Its IPv4 address or IPv6 /64 holds its share of slots.
        OfAddress => "too-many-of-address",
        /// Its /48 holds its share of slots.
        OfPrefix => "too-many-of-prefix",
        /// All together connect too often.
        OverCap => "over-cap",
    }
}

/// A fixed number of slots, shared so that no few can take all.
///
/// An address (or /64) may hold `per_address`, a /48 `per_prefix`, and never more than a quarter, or half, of what is
/// free at the moment. So the fuller it gets the less each may have, and a newcomer finds a slot until about as many
/// prefixes hold slots as there are (dynamic thresholds, as in the buffers of switches).
pub(crate) struct Slots {
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
pub(crate) struct KeAdmission {
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
    use super::*;
    use crate::access::tests::prefixes;
    use crate::ratelimit::tests::{NOW, V4, V6, any_v4, in_48};

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
