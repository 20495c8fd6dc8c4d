//! The corpus of the repository through what cargo-fuzz runs, as it is and with octets changed: see `engine/fuzz`.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Changed copies of each input.
const CHANGED: usize = 60;

/// The corpus has to bring forth all of `reached`, lest it rots.
fn replay(run: fn(&[u8]) -> &'static str, corpora: &[&str], reached: &[&str]) {
    let mut random = StdRng::seed_from_u64(10);
    let mut words = BTreeSet::new();
    for corpus in corpora {
        let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "corpus", corpus].iter().collect();
        let inputs: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        assert!(inputs.len() > 5, "{} is nearly empty", folder.display());
        for input in inputs {
            words.insert(run(&input));
            for _ in 0..CHANGED {
                let mut changed = input.clone();
                for _ in 0..random.random_range(1..4) {
                    if !changed.is_empty() {
                        let place = random.random_range(0..changed.len());
                        changed[place] = random.random();
                    }
                }
                changed.truncate(random.random_range(changed.len() / 2..=changed.len()));
                run(&changed);
            }
        }
    }
    assert_eq!(words, reached.iter().copied().collect());
}

#[test]
fn packets() {
    replay(
        fuzz::packet,
        &["ntp-server", "ntp-server-sealed", "ntp-packet"],
        &[
            "time",
            "nts-time",
            "ntsn",
            "kiss-rate",
            "kiss-deny",
            "malformed",
            "mode",
            "version",
            "legacy-mac",
            "incomplete-nts",
        ],
    );
}

#[test]
fn cookies() {
    replay(fuzz::cookies, &["cookie", "cookie-raw"], &["opened", "refused"]);
}

#[test]
fn key_establishment() {
    replay(
        fuzz::ke,
        &["ke-server", "ke-records", "ke-client"],
        &["ok", "bad-request", "no-protocol", "no-aead", "unknown-critical", "incomplete"],
    );
}

#[test]
fn sources() {
    let mut random = StdRng::seed_from_u64(10);
    for length in (0..2000).step_by(40) {
        let mut input = vec![0; length];
        random.fill(&mut input[..]);
        fuzz::ratelimit(&input);
        // An interval of less than a second, small bursts, no cap.
        for (place, octet) in input.iter_mut().take(14).enumerate() {
            *octet = if matches!(place, 4..8 | 11) { *octet & 7 } else { 0 };
        }
        fuzz::ratelimit(&input);
    }
}
