//! Token buckets: how often an address may ask, as `nts_core.ratelimit` says.
//!
//! Nothing here knows of ports: whoever asks can choose those. An IPv4 address counts alone. IPv6 counts by /64 and,
//! with a wider budget, by /48. `now` is nanoseconds of a clock that never goes back.
//!
//! The table of buckets has a fixed size and is allocated once. Rules for when it is full:
//!
//! 1. An address that the table does not hold has all its tokens: at worst the limits are lost, never the service.
//! 2. The bucket that is nearest to being full is forgotten first.
//! 3. No step looks at more than sixteen entries.

use std::hash::Hasher as _;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

/// Addresses and prefixes remembered by one limiter; 1.1 MB.
pub(crate) const TABLE_ENTRIES: usize = 65_536;
/// A /48 has 256 prefixes of length 56, which is what many providers give to a home.
const WIDE_FACTOR: i64 = 256;
const WAYS: usize = 16;
/// In nanoseconds.
pub(crate) const SECOND: i64 = 1_000_000_000;

/// What an address counts towards: the number of its octets tells addresses and prefixes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    octets: u8,
    number: u64,
}

impl Group {
    /// The address itself for IPv4, its /64 for IPv6; and of the latter its /48.
    #[inline]
    pub(crate) fn of(address: IpAddr) -> (Self, Option<Self>) {
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
    #[cfg(test)]
    fn remembered(&self) -> usize {
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

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    pub(crate) const NOW: i64 = 1_000_000_000_000_000;
    pub(crate) const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    pub(crate) const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1));

    fn limiter(burst: u32, entries: usize) -> RateLimiter {
        RateLimiter::new(SECOND, burst, rand::random(), entries)
    }

    fn taken(limiter: &mut RateLimiter, who: IpAddr, count: usize, now: i64) -> usize {
        (0..count).filter(|_| limiter.take(who, now)).count()
    }

    pub(crate) fn any_v4() -> IpAddr {
        Ipv4Addr::from_bits(rand::random()).into()
    }

    pub(crate) fn in_48(subnet: u16) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, subnet, 0, 0, 0, 0).into()
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
}
