//! Access lists: which addresses are served, as `nts_core.ratelimit.AccessList` says.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

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
pub(crate) struct AccessList {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
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
        assert!(["192.0.2.1", "2001:db8::1"].iter().all(|who| !list.allows(who.parse().unwrap())));
        let list = AccessList::new(&[], &prefixes(&["192.0.2.1/32"])).unwrap();
        assert!(!list.allows("192.0.2.1".parse().unwrap()) && list.allows("2001:db8::1".parse().unwrap()));
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
}
