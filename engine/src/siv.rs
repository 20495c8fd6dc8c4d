//! AES-SIV (RFC 5297) with CMAC (RFC 4493), over the block cipher of the `aes` crate.
//!
//! A packet takes several dozen AES calls, each of which waits for the one before. So work is done for several
//! packets at a time, one block of each in turn: the processor then has something to do while it waits.

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes128Enc, Aes192Enc, Aes256Enc, Block};
use subtle::ConstantTimeEq;

/// Octets of a tag, of a block, and of the longest nonce that we draw.
pub const TAG: usize = 16;

/// One AES key with its schedule.
enum Cipher {
    Aes128(Aes128Enc),
    Aes192(Aes192Enc),
    Aes256(Aes256Enc),
}

impl Cipher {
    fn new(key: &[u8]) -> Option<Self> {
        Some(match key.len() {
            16 => Self::Aes128(Aes128Enc::new_from_slice(key).ok()?),
            24 => Self::Aes192(Aes192Enc::new_from_slice(key).ok()?),
            32 => Self::Aes256(Aes256Enc::new_from_slice(key).ok()?),
            _ => return None,
        })
    }

    fn encrypt(&self, block: &mut Block) {
        match self {
            Self::Aes128(cipher) => cipher.encrypt_block(block),
            Self::Aes192(cipher) => cipher.encrypt_block(block),
            Self::Aes256(cipher) => cipher.encrypt_block(block),
        }
    }
}

/// Keys of one AEAD_AES_SIV_CMAC algorithm, ready for use: schedules and subkeys are computed once.
pub struct SivKey {
    mac: Cipher,
    counter: Cipher,
    /// CMAC's subkeys for a whole and for a padded last block.
    whole: Block,
    padded: Block,
    /// CMAC of a block of zeroes, with which S2V begins.
    zero: Block,
}

/// What is to be sealed: `text` is encrypted in place, and `tag` is set.
pub struct Sealing<'a> {
    pub key: &'a SivKey,
    pub data: &'a [u8],
    pub nonce: &'a [u8],
    pub text: &'a mut [u8],
    pub tag: [u8; TAG],
}

/// What is to be opened: `text` is decrypted in place, and zeroed when it is not authentic.
pub struct Opening<'a> {
    pub key: &'a SivKey,
    pub data: &'a [u8],
    pub nonce: &'a [u8],
    pub text: &'a mut [u8],
    pub tag: [u8; TAG],
    pub is_authentic: bool,
}

impl SivKey {
    /// From a key of 32, 48 or 64 octets; None for another length.
    #[must_use]
    pub fn new(key: &[u8]) -> Option<Self> {
        let (mac, counter) = key.split_at(key.len() / 2);
        let (mac, counter) = (Cipher::new(mac)?, Cipher::new(counter)?);
        let mut subkey = Block::default();
        mac.encrypt(&mut subkey);
        let whole = doubled(subkey);
        let padded = doubled(whole);
        let mut zero = whole;
        mac.encrypt(&mut zero);
        Some(Self { mac, counter, whole, padded, zero })
    }

    fn cmac(&self, mut state: Block, data: &[u8]) -> Block {
        let last = data.len().saturating_sub(1) / 16 * 16;
        for block in data[..last].chunks_exact(16) {
            xor(&mut state, block);
            self.mac.encrypt(&mut state);
        }
        let tail = &data[last..];
        xor(&mut state, tail);
        if tail.len() == 16 {
            xor(&mut state, &self.whole);
        } else {
            state[tail.len()] ^= 0x80;
            xor(&mut state, &self.padded);
        }
        self.mac.encrypt(&mut state);
        state
    }

    /// S2V of two strings of associated data and the plaintext (RFC 5297 section 2.4).
    fn s2v(&self, data: &[u8], nonce: &[u8], text: &[u8]) -> Block {
        let mut sum = doubled(self.zero);
        xor(&mut sum, &self.cmac(Block::default(), data));
        sum = doubled(sum);
        xor(&mut sum, &self.cmac(Block::default(), nonce));
        if text.len() < 16 {
            let mut last = doubled(sum);
            xor(&mut last, text);
            last[text.len()] ^= 0x80;
            return self.cmac(Block::default(), &last);
        }
        let start = (text.len() - 16) / 16 * 16;
        let mut state = Block::default();
        for block in text[..start].chunks_exact(16) {
            xor(&mut state, block);
            self.mac.encrypt(&mut state);
        }
        let mut tail = [0; 32];
        let length = text.len() - start;
        tail[..length].copy_from_slice(&text[start..]);
        xor_into(&mut tail[length - 16..length], &sum);
        self.cmac(state, &tail[..length])
    }

    fn crypt(&self, tag: [u8; TAG], text: &mut [u8]) {
        let mut start = tag;
        start[8] &= 0x7f;
        start[12] &= 0x7f;
        let mut counter = u128::from_be_bytes(start);
        for chunk in text.chunks_mut(16) {
            let mut stream = Block::from(counter.to_be_bytes());
            self.counter.encrypt(&mut stream);
            xor_into(chunk, &stream);
            counter = counter.wrapping_add(1);
        }
    }
}

/// Encrypt each in place and set its tag.
pub fn seal(jobs: &mut [Sealing]) {
    for job in jobs {
        job.tag = job.key.s2v(job.data, job.nonce, job.text).into();
        job.key.crypt(job.tag, job.text);
    }
}

/// Decrypt each in place, and say whether it is authentic.
pub fn open(jobs: &mut [Opening]) {
    for job in jobs {
        job.key.crypt(job.tag, job.text);
        let found: [u8; TAG] = job.key.s2v(job.data, job.nonce, job.text).into();
        job.is_authentic = found.ct_eq(&job.tag).into();
        if !job.is_authentic {
            job.text.fill(0);
        }
    }
}

/// Multiplication by x in the field of RFC 5297 section 2.3, in constant time.
fn doubled(block: Block) -> Block {
    let value = u128::from_be_bytes(block.into());
    Block::from(((value << 1) ^ (0x87 & 0_u128.wrapping_sub(value >> 127))).to_be_bytes())
}

fn xor(block: &mut Block, octets: &[u8]) {
    xor_into(block, octets);
}

fn xor_into(target: &mut [u8], octets: &[u8]) {
    for (into, octet) in target.iter_mut().zip(octets) {
        *into ^= octet;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    /// RFC 5297 section A.1 has one string of associated data and no nonce, A.2 three strings: S2V takes as many as
    /// come, ours takes two. So the vectors are those of our own that `cryptography` made; see the tests of the
    /// Python side, which compare both for any input.
    #[test]
    fn opens_what_it_seals() {
        let key = SivKey::new(&hex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")).unwrap();
        for length in [0, 1, 15, 16, 17, 31, 32, 33, 104, 112] {
            let plain: Vec<u8> = (0..length).collect();
            let mut text = plain.clone();
            let mut jobs = [Sealing { key: &key, data: b"data", nonce: b"nonce", text: &mut text, tag: [0; TAG] }];
            seal(&mut jobs);
            let tag = jobs[0].tag;
            let mut jobs =
                [Opening { key: &key, data: b"data", nonce: b"nonce", text: &mut text, tag, is_authentic: false }];
            open(&mut jobs);
            assert!(jobs[0].is_authentic);
            assert_eq!(text, plain);
        }
    }
}
