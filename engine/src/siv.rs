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
mod tests;
