//! NTP's time formats (RFC 5905 section 6), as `nts_core.ntptime` has them.

/// Seconds from 1900 to 1970 (RFC 5905 figure 4).
const UNIX_EPOCH: i64 = 2_208_988_800;
const NANOSECONDS: i64 = 1_000_000_000;

/// The 64-bit timestamp of Unix nanoseconds, rounded down to its 233 ps steps; eras of 136 years follow each other.
#[allow(clippy::cast_sign_loss)] // eras wrap, as the format does
pub fn timestamp(unix_ns: i64) -> u64 {
    let seconds = unix_ns.div_euclid(NANOSECONDS) + UNIX_EPOCH;
    let fraction = ((unix_ns.rem_euclid(NANOSECONDS) as u64) << 32) / NANOSECONDS as u64;
    ((seconds as u64) << 32) | fraction
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn epochs_and_eras() {
        assert_eq!(timestamp(0), 2_208_988_800 << 32);
        assert_eq!(timestamp(500_000_000), (2_208_988_800 << 32) | (1 << 31));
        assert_eq!(timestamp(-1) >> 32, 2_208_988_799);
        // 2036-02-07 06:28:16 UTC begins era 1.
        assert_eq!(timestamp(2_085_978_496_000_000_000), 0);
    }
}
