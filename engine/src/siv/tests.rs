use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// RFC 4493 and RFC 5297 for any number of strings, as they are written there: one step after the other, on octets.
mod plainly {
    use super::super::{Block, Cipher};

    fn encrypt(cipher: &Cipher, octets: &[u8]) -> Vec<u8> {
        let mut block = Block::try_from(octets).unwrap();
        cipher.encrypt(&mut block);
        block.to_vec()
    }

    pub fn dbl(octets: &[u8]) -> Vec<u8> {
        let mut out: Vec<u8> =
            (0..16).map(|i| octets[i] << 1 | octets.get(i + 1).map_or(0, |next| next >> 7)).collect();
        if octets[0] & 0x80 != 0 {
            out[15] ^= 0x87;
        }
        out
    }

    fn xor(a: &[u8], b: &[u8]) -> Vec<u8> {
        a.iter().zip(b).map(|(a, b)| a ^ b).collect()
    }

    fn pad(octets: &[u8]) -> Vec<u8> {
        let mut out = octets.to_vec();
        out.push(0x80);
        out.resize(16, 0);
        out
    }

    pub fn cmac(cipher: &Cipher, message: &[u8]) -> Vec<u8> {
        let k1 = dbl(&encrypt(cipher, &[0; 16]));
        let last = message.len().saturating_sub(1) / 16 * 16;
        let mut state = vec![0; 16];
        for block in message[..last].chunks(16) {
            state = encrypt(cipher, &xor(&state, block));
        }
        let tail = &message[last..];
        let tail = if tail.len() == 16 { xor(tail, &k1) } else { xor(&pad(tail), &dbl(&k1)) };
        encrypt(cipher, &xor(&state, &tail))
    }

    pub fn seal(key: &[u8], strings: &[&[u8]], text: &[u8]) -> Vec<u8> {
        let (mac, counter) = key.split_at(key.len() / 2);
        let (mac, counter) = (Cipher::new(mac), Cipher::new(counter));
        let mut sum = cmac(&mac, &[0; 16]);
        for string in strings {
            sum = xor(&dbl(&sum), &cmac(&mac, string));
        }
        let mut out = if text.len() >= 16 {
            let (before, end) = text.split_at(text.len() - 16);
            cmac(&mac, &[before, &xor(end, &sum)].concat())
        } else {
            cmac(&mac, &xor(&dbl(&sum), &pad(text)))
        };
        let mut count = out.clone();
        count[8] &= 0x7f;
        count[12] &= 0x7f;
        let first = u128::from_be_bytes(count.try_into().unwrap());
        for (count, block) in (first..).zip(text.chunks(16)) {
            out.extend(xor(block, &encrypt(&counter, &count.to_be_bytes())));
        }
        out
    }
}

/// One string's CMAC the quick way.
fn cmac(key: &SivKey, string: &[u8]) -> Vec<u8> {
    let mut chain = Chain::of(key, string);
    for block in chain.blocks {
        chain.absorb(block);
    }
    chain.finish();
    chain.state.to_vec()
}

#[test]
fn cmac_of_rfc_4493() {
    let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
    let both = SivKey::new(&[&key[..], &key].concat()).unwrap();
    let message = hex("6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51
        30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710");
    for (length, expected) in [
        (0, "bb1d6929e95937287fa37d129b756746"),
        (16, "070a16b46b4d4144f79bdd9dd04a287c"),
        (40, "dfa66747de9ae63030ca32611497c827"),
        (64, "51f0bebf7e3b9d92fc49741779363cfe"),
    ] {
        assert_eq!(cmac(&both, &message[..length]), hex(expected));
        assert_eq!(plainly::cmac(&both.mac, &message[..length]), hex(expected));
    }
    let subkey = plainly::dbl(&hex("7df76b0c1ab899b33e42f047b91b546f"));
    assert_eq!(both.subkeys.whole.to_be_bytes()[..], subkey);
    assert_eq!(subkey, hex("fbeed618357133667c85e08f7236a8de"));
}

/// Sections A.1 and A.2 have one string of associated data and three, ours has two: they prove what proves ours.
#[test]
fn vectors_of_rfc_5297() {
    let sealed = plainly::seal(
        &hex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"),
        &[&hex("101112131415161718191a1b1c1d1e1f2021222324252627")],
        &hex("112233445566778899aabbccddee"),
    );
    assert_eq!(sealed, hex("85632d07c6e8f37f950acd320a2ecc93 40c02b9690c4dc04daef7f6afe5c"));
    let sealed = plainly::seal(
        &hex("7f7e7d7c7b7a79787776757473727170404142434445464748494a4b4c4d4e4f"),
        &[
            &hex("00112233445566778899aabbccddeeffdeaddadadeaddadaffeeddccbbaa99887766554433221100"),
            &hex("102030405060708090a0"),
            &hex("09f911029d74e35bd84156c5635688c0"),
        ],
        &hex("7468697320697320736f6d6520706c61696e7465787420746f20656e6372797074207573696e67205349562d414553"),
    );
    assert_eq!(
        sealed,
        hex("7bdb6e3b432667eb06f4d14bff2fbd0f cb900f2fddbe404326601965c889bf17
            dba77ceb094fa663b7a3f748ba8af829 ea64ad544a272e9c485b62a3fd5c0d")
    );
}

/// Made with OpenSSL, by `cryptography`.
#[test]
fn longer_keys() {
    let octets = |range: std::ops::Range<u8>| range.collect::<Vec<u8>>();
    for (length, expected) in [
        (
            48,
            "f9be27b3bddb2eb7d38c5d885fe8a13fa180450eb5940b453fdcf65a6d028f8e9635a0f2dd582b3f3fbe58b11731b3b00553bab2d6",
        ),
        (
            64,
            "b7fd38e2f0d6ce11d9ffe60a98fbc349f05a16abfb5564686d20dcd8b1aa0918b59d07a72fccc6925f965f8fad5c33007c11d27f78",
        ),
    ] {
        let key = SivKey::new(&octets(0..length)).unwrap();
        let (mut tag, mut text) = ([0; TAG], octets(100..137));
        let (data, nonce) = (octets(0..33), octets(200..216));
        seal(&mut [Sealing { key: &key, data: &data, nonce: &nonce, tag: &mut tag, text: &mut text }]);
        assert_eq!([&tag[..], &text].concat(), hex(expected));
    }
    assert!(SivKey::new(&octets(0..40)).is_none());
}

struct Job {
    key: Vec<u8>,
    data: Vec<u8>,
    nonce: Vec<u8>,
    text: Vec<u8>,
}

impl Job {
    /// Of any lengths, those around the ends of blocks more often than others.
    fn any(rng: &mut StdRng) -> Self {
        let mut octets = |most: usize| {
            let length = rng.random_range(0..=most) / [1, 16][rng.random_range(0..2)] * [1, 16][rng.random_range(0..2)];
            (0..length.min(most)).map(|_| rng.random()).collect::<Vec<u8>>()
        };
        let (data, nonce, text) = (octets(300), octets(40), octets(900));
        let key = (0..[32, 48, 64][rng.random_range(0..3)]).map(|_| rng.random()).collect();
        Self { key, data, nonce, text }
    }
}

/// Any number of jobs with any keys, those that stay and those of a packet, do not disturb each other.
#[test]
fn side_by_side_as_one_after_the_other() {
    let mut rng = StdRng::seed_from_u64(5297);
    for _ in 0..300 {
        let jobs: Vec<Job> = (0..rng.random_range(1..12)).map(|_| Job::any(&mut rng)).collect();
        let mut keys: Vec<SivKey> = jobs.iter().map(|job| SivKey::underived(&job.key)).collect();
        for some in keys.chunks_mut(LANES) {
            derive(some.iter_mut());
        }
        for (key, job) in keys.iter_mut().zip(&jobs) {
            if rng.random() {
                *key = SivKey::new(&job.key).unwrap();
            }
        }
        let expected: Vec<Vec<u8>> =
            jobs.iter().map(|job| plainly::seal(&job.key, &[&job.data, &job.nonce], &job.text)).collect();

        let mut rooms: Vec<Vec<u8>> = jobs.iter().map(|job| [&[0; TAG][..], &job.text].concat()).collect();
        let mut sealing: Vec<Sealing> = (jobs.iter().zip(&keys).zip(&mut rooms))
            .map(|((Job { data, nonce, .. }, key), room)| {
                let (tag, text) = room.split_at_mut(TAG);
                Sealing { key, data, nonce, tag, text }
            })
            .collect();
        seal(&mut sealing);
        assert_eq!(rooms, expected);

        // Every third has an octet turned, of the tag, the text, the data or the nonce.
        let mut jobs = jobs;
        let broken: Vec<bool> = (0..jobs.len()).map(|_| rng.random_range(0..3) == 0).collect();
        for ((job, room), _) in jobs.iter_mut().zip(&mut rooms).zip(&broken).filter(|(_, broken)| **broken) {
            let parts = [&mut room[..], &mut job.data, &mut job.nonce];
            let mut parts: Vec<&mut [u8]> = parts.into_iter().filter(|part| !part.is_empty()).collect();
            let part = rng.random_range(0..parts.len());
            let place = rng.random_range(0..parts[part].len());
            parts[part][place] ^= 1 << rng.random_range(0..8);
        }
        let mut verdicts = vec![false; jobs.len()];
        let mut opening: Vec<Opening> = (jobs.iter().zip(&keys).zip(&mut rooms).zip(&mut verdicts))
            .map(|(((Job { data, nonce, .. }, key), room), is_authentic)| {
                let (&mut tag, text) = room.split_first_chunk_mut().unwrap();
                Opening { key, data, nonce, tag, text, is_authentic }
            })
            .collect();
        open(&mut opening);
        for (((job, room), broken), verdict) in jobs.iter().zip(&rooms).zip(broken).zip(verdicts) {
            assert_eq!(verdict, !broken);
            assert_eq!(room[TAG..], if broken { vec![0; job.text.len()] } else { job.text.clone() });
        }
    }
}

/// The counter's two zeroed bits, and a sum that carries through all octets below them.
#[test]
fn the_counter_carries() {
    let key = SivKey::new(&[7; 32]).unwrap();
    let Counter::Ready(cipher) = &key.counter else { panic!("a key that stays") };
    let mut text = [0; 48];
    crypt(std::iter::once((&key, [0xff; TAG], &mut text[..])));
    for (place, block) in text.chunks(16).enumerate() {
        let mut count = [0xff; 16];
        count[8] = 0x7f;
        count[12] = 0x7f;
        let mut expected = Block::from((u128::from_be_bytes(count) + place as u128).to_be_bytes());
        cipher.encrypt(&mut expected);
        assert_eq!(block, &expected[..]);
    }
}
