//! AES-SIV (RFC 5297) with CMAC (RFC 4493), over the block cipher of the `aes` crate.
//!
//! A packet takes several dozen AES calls, most of which wait for the one before. So work is done for several packets
//! at a time, one block of each in turn: the processor then has something to do while it waits.
//!
//! Three rules keep it quick. What is computed from a block and encrypted again soon goes through one 16-octet store
//! (`xor`), since a load of 16 octets waits long for two stores of 8. What needs arithmetic (`u128`) is done for all
//! jobs before the first of them is encrypted. Lists are extended where they are, since `collect` would copy them.
//!
//! It takes the same time for all secrets of one length: no table, no branch and no index depends on one. That `aes`
//! does the same is its promise, with the processor's instructions and without them.

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes128Enc, Aes192Enc, Aes256Enc, Block};
use arrayvec::ArrayVec;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Octets of a tag, and of a block.
pub const TAG: usize = 16;
/// How many jobs advance side by side.
pub const LANES: usize = 8;
/// How many blocks of one job's key stream are made at once: the text of an answer with one cookie.
const STREAM: usize = 8;

/// One AES key with its schedule.
enum Cipher {
    Aes128(Aes128Enc),
    Aes192(Aes192Enc),
    Aes256(Aes256Enc),
}

impl Cipher {
    /// From 16, 24 or 32 octets; it panics for other lengths.
    #[inline(always)] // else what is made is copied once more
    #[allow(clippy::inline_always)]
    fn new(key: &[u8]) -> Self {
        const LENGTHS: &str = "AES keys have 16, 24 or 32 octets";
        match key.len() {
            16 => Self::Aes128(Aes128Enc::new(key.try_into().expect(LENGTHS))),
            24 => Self::Aes192(Aes192Enc::new(key.try_into().expect(LENGTHS))),
            _ => Self::Aes256(Aes256Enc::new(key.try_into().expect(LENGTHS))),
        }
    }

    #[inline(always)] // one call a block is enough
    #[allow(clippy::inline_always)]
    fn encrypt(&self, block: &mut Block) {
        match self {
            Self::Aes128(cipher) => cipher.encrypt_block(block),
            Self::Aes192(cipher) => cipher.encrypt_block(block),
            Self::Aes256(cipher) => cipher.encrypt_block(block),
        }
    }

    #[inline]
    fn encrypt_all(&self, blocks: &mut [Block]) {
        match self {
            Self::Aes128(cipher) => cipher.encrypt_blocks(blocks),
            Self::Aes192(cipher) => cipher.encrypt_blocks(blocks),
            Self::Aes256(cipher) => cipher.encrypt_blocks(blocks),
        }
    }
}

/// What CMAC adds to a whole and to a padded last block, and what S2V begins with: CMAC of a block of zeroes, doubled
/// once for each of its two further strings.
#[derive(Default, Zeroize, ZeroizeOnDrop)]
struct Subkeys {
    whole: u128,
    padded: u128,
    zero: u128,
}

/// The key of the counter mode.
enum Counter {
    /// Apart, so that the keys of one packet are short.
    Ready(Box<Cipher>),
    /// Its schedule is made where there is a text: a request has none.
    Later([u8; 32], usize),
}

/// One key of an `AEAD_AES_SIV_CMAC` algorithm.
pub struct SivKey {
    mac: Cipher,
    subkeys: Subkeys,
    counter: Counter,
}

impl Drop for SivKey {
    fn drop(&mut self) {
        if let Counter::Later(key, _) = &mut self.counter {
            key.as_mut_slice().zeroize();
        }
    }
}

impl SivKey {
    /// A key that stays, of 32, 48 or 64 octets; None for another length.
    pub fn new(key: &[u8]) -> Option<Self> {
        if ![32, 48, 64].contains(&key.len()) {
            return None;
        }
        let mut ready = Self::underived(key);
        ready.counter = Counter::Ready(Box::new(Cipher::new(&key[key.len() / 2..])));
        derive(std::iter::once(&mut ready));
        Some(ready)
    }

    /// A key of one packet, which `derive` has to make ready; it panics for other lengths.
    #[inline(always)] // else what is made is copied once more
    #[allow(clippy::inline_always)]
    pub(crate) fn underived(key: &[u8]) -> Self {
        let (mac, counter) = key.split_at(key.len() / 2);
        let mut later = [0; 32];
        later[..counter.len()].copy_from_slice(counter);
        let counter = Counter::Later(later, counter.len());
        Self { mac: Cipher::new(mac), subkeys: Subkeys::default(), counter }
    }
}

/// The subkeys of up to `LANES` keys, side by side.
pub(crate) fn derive<'a>(underived: impl Iterator<Item = &'a mut SivKey>) {
    let mut keys = ArrayVec::<_, LANES>::new();
    keys.extend(underived);
    let mut blocks = [Block::default(); LANES];
    for (key, block) in keys.iter().zip(&mut blocks) {
        key.mac.encrypt(block);
    }
    for (key, block) in keys.iter_mut().zip(&mut blocks) {
        let whole = doubled(number_of(block));
        (key.subkeys.whole, key.subkeys.padded) = (whole, doubled(whole));
        *block = block_of(whole);
    }
    for (key, block) in keys.iter().zip(&mut blocks) {
        key.mac.encrypt(block);
    }
    for (key, block) in keys.iter_mut().zip(&blocks) {
        key.subkeys.zero = doubled(doubled(number_of(block)));
    }
}

/// What is to be sealed: `text` is encrypted in place, and `tag`, of `TAG` octets, is set.
pub struct Sealing<'a> {
    pub key: &'a SivKey,
    pub data: &'a [u8],
    pub nonce: &'a [u8],
    pub tag: &'a mut [u8],
    pub text: &'a mut [u8],
}

/// What is to be opened: `text` is decrypted in place, and zeroed when it is not authentic.
pub struct Opening<'a> {
    pub key: &'a SivKey,
    pub data: &'a [u8],
    pub nonce: &'a [u8],
    pub tag: [u8; TAG],
    pub text: &'a mut [u8],
    pub is_authentic: &'a mut bool,
}

/// Encrypt each in place and set its tag.
pub fn seal(jobs: &mut [Sealing]) {
    for jobs in jobs.chunks_mut(LANES) {
        let tags = s2v(jobs.iter().map(|Sealing { key, data, nonce, text, .. }| Strings { key, data, nonce, text }));
        for (job, tag) in jobs.iter_mut().zip(&tags) {
            job.tag.copy_from_slice(tag);
        }
        crypt(jobs.iter_mut().zip(&tags).map(|(job, tag)| (job.key, tag.0, &mut *job.text)));
    }
}

/// Decrypt each in place, and say whether it is authentic.
pub fn open(jobs: &mut [Opening]) {
    for jobs in jobs.chunks_mut(LANES) {
        crypt(jobs.iter_mut().map(|job| (job.key, job.tag, &mut *job.text)));
        let tags = s2v(jobs.iter().map(|Opening { key, data, nonce, text, .. }| Strings { key, data, nonce, text }));
        for (job, tag) in jobs.iter_mut().zip(&tags) {
            *job.is_authentic = number_of(tag).ct_eq(&u128::from_be_bytes(job.tag)).into();
            if !*job.is_authentic {
                job.text.fill(0);
            }
        }
    }
}

/// What the tag of one job is computed from; `text` is the plaintext.
struct Strings<'a> {
    key: &'a SivKey,
    data: &'a [u8],
    nonce: &'a [u8],
    text: &'a [u8],
}

impl Strings<'_> {
    /// How many blocks of the plaintext come before the octets that S2V changes, its last 16.
    fn unchanged(&self) -> usize {
        self.text.len().saturating_sub(TAG) / 16
    }
}

/// One CMAC under way: whole blocks, and what the last one adds.
struct Chain<'a> {
    cipher: &'a Cipher,
    state: Block,
    blocks: &'a [[u8; 16]],
    last: Block,
}

impl<'a> Chain<'a> {
    #[inline]
    fn of(key: &'a SivKey, string: &'a [u8]) -> Self {
        let (blocks, rest) = string.as_chunks();
        let (blocks, last) = match (blocks.split_last(), rest) {
            (Some((last, before)), []) => (before, u128::from_be_bytes(*last) ^ key.subkeys.whole),
            _ => (blocks, padded(string, rest.len()) ^ key.subkeys.padded),
        };
        Self { cipher: &key.mac, state: Block::default(), blocks, last: block_of(last) }
    }

    /// One that goes on otherwise after so many blocks.
    #[inline]
    fn unfinished(key: &'a SivKey, string: &'a [u8], blocks: usize) -> Self {
        Self { cipher: &key.mac, state: Block::default(), blocks: &string.as_chunks().0[..blocks], last: block_of(0) }
    }

    #[inline]
    fn absorb(&mut self, block: &[u8; 16]) {
        xor(&mut self.state.0, block);
        self.cipher.encrypt(&mut self.state);
    }

    #[inline]
    fn finish(&mut self) {
        xor(&mut self.state.0, &self.last.0);
        self.cipher.encrypt(&mut self.state);
    }
}

/// S2V of two strings of associated data and the plaintext (RFC 5297 section 2.4), for up to `LANES` jobs.
fn s2v<'a>(strings: impl Iterator<Item = Strings<'a>>) -> ArrayVec<Block, LANES> {
    let mut jobs = ArrayVec::<_, LANES>::new();
    jobs.extend(strings);
    let mut chains = ArrayVec::<_, LANES>::new();
    chains.extend(jobs.iter().map(|job| {
        let text = Chain::unfinished(job.key, job.text, job.unchanged());
        [Chain::of(job.key, job.data), Chain::of(job.key, job.nonce), text]
    }));
    let longest = chains.as_flattened().iter().map(|chain| chain.blocks.len()).max().unwrap_or(0);
    for place in 0..longest {
        for chain in chains.as_flattened_mut() {
            if let Some(block) = chain.blocks.get(place) {
                chain.absorb(block);
            }
        }
    }
    for [data, nonce, _] in &mut chains {
        data.finish();
        nonce.finish();
    }
    let mut before = ArrayVec::<_, LANES>::new();
    before.extend(jobs.iter().zip(&mut chains).map(|(job, [data, nonce, text])| end(job, data, nonce, text)));
    for ([_, _, text], before) in chains.iter_mut().zip(&before) {
        if let Some(block) = before {
            text.absorb(&block.0);
        }
    }
    for [_, _, text] in &mut chains {
        text.finish();
    }
    chains.iter().map(|[_, _, text]| text.state).collect()
}

/// Sets the last block of the plaintext's chain, with which what came of the other strings goes in, and gives the one
/// before it where that lies across two blocks.
#[inline]
fn end(job: &Strings, data: &Chain, nonce: &Chain, text: &mut Chain) -> Option<Block> {
    let Subkeys { whole, padded: ragged, zero } = job.key.subkeys;
    let sum = zero ^ doubled(number_of(&data.state)) ^ number_of(&nonce.state);
    let Some(end) = job.text.last_chunk() else {
        text.last = block_of(doubled(sum) ^ padded(job.text, job.text.len()) ^ whole);
        return None;
    };
    let end = u128::from_be_bytes(*end) ^ sum;
    let over = job.text.len() % 16;
    if over == 0 {
        text.last = block_of(end ^ whole);
        return None;
    }
    let bits = 8 * over;
    let before = u128::from_be_bytes(job.text.as_chunks().0[text.blocks.len()]) >> (128 - bits);
    text.last = block_of((end << 1 | 1) << (127 - bits) ^ ragged);
    Some(block_of(before << (128 - bits) | end >> bits))
}

/// The counter mode of RFC 5297 section 2.5 for up to `LANES` jobs: key, tag and text of each.
fn crypt<'a>(texts: impl Iterator<Item = (&'a SivKey, [u8; TAG], &'a mut [u8])>) {
    // Two bits are zeroed, so that no sum carries beyond 32 of them.
    let mut jobs = ArrayVec::<(&SivKey, u128, &mut [u8]), LANES>::new();
    jobs.extend(texts.map(|(key, tag, text)| (key, u128::from_be_bytes(tag) & !(1 << 63 | 1 << 31), text)));
    while jobs.iter().any(|(_, _, text)| !text.is_empty()) {
        let mut streams = [[Block::default(); STREAM]; LANES];
        for ((_, counter, text), stream) in jobs.iter_mut().zip(&mut streams) {
            for block in &mut stream[..text.len().div_ceil(16).min(STREAM)] {
                *block = block_of(*counter);
                *counter += 1;
            }
        }
        for ((key, _, text), stream) in jobs.iter().zip(&mut streams) {
            let stream = &mut stream[..text.len().div_ceil(16).min(STREAM)];
            match &key.counter {
                _ if stream.is_empty() => {}
                Counter::Ready(cipher) => cipher.encrypt_all(stream),
                Counter::Later(key, length) => Cipher::new(&key[..*length]).encrypt_all(stream),
            }
        }
        for ((_, _, text), stream) in jobs.iter_mut().zip(&streams) {
            let all = std::mem::take(text);
            let (now, later) = all.split_at_mut(all.len().min(16 * STREAM));
            *text = later;
            let (blocks, rest) = now.as_chunks_mut();
            let used = blocks.len();
            for (block, stream) in blocks.iter_mut().zip(stream) {
                xor(block, &stream.0);
            }
            for (octet, stream) in rest.iter_mut().zip(stream.get(used).into_iter().flatten()) {
                *octet ^= stream;
            }
        }
    }
}

/// The last so many octets of a string, fewer than 16, as a block: with a bit behind them, and zeroes.
#[inline]
fn padded(string: &[u8], octets: usize) -> u128 {
    let value = match string.last_chunk() {
        Some(end) => u128::from_be_bytes(*end),
        None => string.iter().fold(0, |value, octet| value << 8 | u128::from(*octet)),
    };
    (value << 1 | 1) << (127 - 8 * octets)
}

/// Multiplication by x in the field of RFC 5297 section 2.3.
#[inline]
fn doubled(value: u128) -> u128 {
    value << 1 ^ (0x87 & 0_u128.wrapping_sub(value >> 127))
}

#[inline]
fn number_of(block: &Block) -> u128 {
    u128::from_be_bytes(block.0)
}

#[inline]
fn block_of(number: u128) -> Block {
    Block::from(number.to_be_bytes())
}

/// One load each and one store: see the module's second rule.
#[inline]
fn xor(block: &mut [u8; 16], other: &[u8; 16]) {
    let (old, other) = (*block, *other);
    *block = std::array::from_fn(|place| old[place] ^ other[place]);
}

#[cfg(test)]
mod tests {
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
                let length =
                    rng.random_range(0..=most) / [1, 16][rng.random_range(0..2)] * [1, 16][rng.random_range(0..2)];
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
}
