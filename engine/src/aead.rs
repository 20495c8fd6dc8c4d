//! AEAD algorithms as NTS uses them (RFC 8915 section 5.1), as `nts_core.aead` has them.

use aes::Aes128Enc;
use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::{AesGcmSiv, Tag};
use arrayvec::ArrayVec;
use zeroize::Zeroize;

use crate::siv::{self, LANES, SivKey, TAG};

/// Octets of the longest key of any algorithm.
pub const LONGEST_KEY: usize = 64;

/// Numeric identifiers from the IANA AEAD registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AeadId {
    SivCmac256 = 15,
    SivCmac384 = 16,
    SivCmac512 = 17,
    Aes128GcmSiv = 30,
}

impl AeadId {
    /// The algorithm of a number, None for one that is not known here.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        Some(match number {
            15 => Self::SivCmac256,
            16 => Self::SivCmac384,
            17 => Self::SivCmac512,
            30 => Self::Aes128GcmSiv,
            _ => return None,
        })
    }

    /// Octets of a key.
    #[must_use]
    pub const fn key_length(self) -> usize {
        match self {
            Self::SivCmac256 => 32,
            Self::SivCmac384 => 48,
            Self::SivCmac512 => 64,
            Self::Aes128GcmSiv => 16,
        }
    }

    /// Octets of the nonces that we draw, and of section 5.6's `N_REQ`.
    #[must_use]
    pub const fn nonce_length(self) -> usize {
        match self {
            Self::Aes128GcmSiv => 12,
            _ => 16,
        }
    }
}

/// What key establishment agreed on: the algorithm, and one key a direction.
pub struct SessionKeys {
    pub aead: AeadId,
    keys: [u8; 2 * LONGEST_KEY],
}

impl Drop for SessionKeys {
    fn drop(&mut self) {
        // As a slice: of an array it would go octet by octet.
        self.keys.as_mut_slice().zeroize();
    }
}

impl SessionKeys {
    /// From both keys one behind the other, client to server first, `2 * key_length` octets.
    #[must_use]
    #[inline]
    pub fn new(aead: AeadId, both: &[u8]) -> Option<Self> {
        let mut keys = [0; 2 * LONGEST_KEY];
        if both.len() != 2 * aead.key_length() {
            return None;
        }
        keys[..both.len()].copy_from_slice(both);
        Some(Self { aead, keys })
    }

    /// The key of what clients send.
    #[must_use]
    pub fn c2s(&self) -> &[u8] {
        &self.keys[..self.aead.key_length()]
    }

    /// The key of what the server sends.
    #[must_use]
    pub fn s2c(&self) -> &[u8] {
        let length = self.aead.key_length();
        &self.keys[length..2 * length]
    }

    /// For a cookie to be opened in place.
    pub(crate) fn both_mut(&mut self) -> &mut [u8] {
        &mut self.keys[..2 * self.aead.key_length()]
    }

    /// Both, one behind the other, as they are in a cookie.
    #[must_use]
    pub fn both(&self) -> &[u8] {
        &self.keys[..2 * self.aead.key_length()]
    }
}

/// One key of any algorithm, for one packet.
pub enum Aead {
    Siv(SivKey),
    GcmSiv(AesGcmSiv<Aes128Enc>),
}

impl Aead {
    /// The keys of up to `LANES` packets: algorithm, and octets in the number that it has.
    ///
    /// # Panics
    /// When a key has another length.
    pub fn of_packets<'a>(ready: &mut ArrayVec<Self, LANES>, keys: impl Iterator<Item = (AeadId, &'a [u8])>) {
        ready.extend(keys.map(|(algorithm, key)| match algorithm {
            AeadId::Aes128GcmSiv => Self::GcmSiv(AesGcmSiv::new(key.try_into().expect("16 octets"))),
            _ => Self::Siv(SivKey::underived(key)),
        }));
        siv::derive(ready.iter_mut().filter_map(|key| match key {
            Self::Siv(key) => Some(key),
            Self::GcmSiv(_) => None,
        }));
    }
}

/// What is to be sealed or opened in place: `sealed` is a ciphertext with its tag, as the algorithm has them; where the
/// plaintext stands in it tells `text_in`.
pub struct Work<'a> {
    pub aead: &'a Aead,
    pub nonce: &'a [u8],
    pub data: &'a [u8],
    pub sealed: &'a mut [u8],
}

/// Seal up to `LANES` plaintexts.
///
/// # Panics
/// When there is no room for a tag, or a nonce has not the length that we draw.
pub fn seal<'a>(all: impl Iterator<Item = Work<'a>>) {
    let mut jobs = ArrayVec::<_, LANES>::new();
    jobs.extend(all.filter_map(|Work { aead, nonce, data, sealed }| match aead {
        Aead::Siv(key) => {
            let (tag, text) = sealed.split_at_mut(TAG);
            Some(siv::Sealing { key, data, nonce, tag, text })
        }
        Aead::GcmSiv(key) => {
            let (text, tag) = sealed.split_at_mut(sealed.len() - TAG);
            let nonce = nonce.try_into().expect("a nonce of 12 octets");
            // It fails for lengths beyond 2^36 octets only.
            let made = key.encrypt_inout_detached(nonce, data, text.into()).expect("a short text");
            tag.copy_from_slice(&made);
            None
        }
    }));
    siv::seal(&mut jobs);
}

/// Open up to `LANES` ciphertexts. Each comes with the place of its verdict, which becomes true when key, nonce, data and
/// tag belong together.
pub fn open<'a>(all: impl Iterator<Item = (Work<'a>, &'a mut bool)>) {
    let mut jobs = ArrayVec::<_, LANES>::new();
    jobs.extend(all.filter_map(|(Work { aead, nonce, data, sealed }, is_authentic)| {
        *is_authentic = false;
        match aead {
            Aead::Siv(key) => {
                let (&mut tag, text) = sealed.split_first_chunk_mut()?;
                Some(siv::Opening { key, data, nonce, tag, text, is_authentic })
            }
            Aead::GcmSiv(key) => {
                let (text, &mut tag) = sealed.split_last_chunk_mut()?;
                let nonce = nonce.try_into().ok()?;
                *is_authentic = key.decrypt_inout_detached(nonce, data, text.into(), &Tag::from(tag)).is_ok();
                None
            }
        }
    }));
    siv::open(&mut jobs);
}

/// Where the plaintext stands in the room of a ciphertext of `length` octets, tag included.
#[must_use]
pub const fn text_in(algorithm: AeadId, length: usize) -> std::ops::Range<usize> {
    match algorithm {
        AeadId::Aes128GcmSiv => 0..length - TAG,
        _ => TAG..length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8452 section C.1: key, nonce, data, plaintext and what comes of it.
    #[test]
    fn vectors_of_rfc_8452() {
        let (mut key, mut nonce) = ([0; 16], [0; 12]);
        (key[0], nonce[0]) = (1, 3);
        for (data, text, expected) in [
            (&[][..], &[][..], 0x_dc20_e2d8_3f25_705b_b49e_439e_ca56_de25_u128),
            (&[], &[1, 0, 0, 0, 0, 0, 0, 0], 0x_578782fff6013b815b287c22493a364c),
            (&[1], &[2, 0, 0, 0, 0, 0, 0, 0], 0x_3b0a1a2560969cdf790d99759abd1508),
        ] {
            let mut aead = ArrayVec::new();
            Aead::of_packets(&mut aead, std::iter::once((AeadId::Aes128GcmSiv, &key[..])));
            let aead = &aead[0];
            let mut room = vec![0; text.len() + TAG];
            room[text_in(AeadId::Aes128GcmSiv, text.len() + TAG)].copy_from_slice(text);
            seal(std::iter::once(Work { aead, nonce: &nonce, data, sealed: &mut room }));
            assert_eq!(room[text.len()..], expected.to_be_bytes());

            let mut verdict = false;
            open(std::iter::once((Work { aead, nonce: &nonce, data, sealed: &mut room.clone() }, &mut verdict)));
            assert!(verdict);
            for (nonce, data, mut sealed) in
                [(&nonce[..11], data, room.clone()), (&nonce, &[9], room.clone()), (&nonce, data, vec![0; 15])]
            {
                open(std::iter::once((Work { aead, nonce, data, sealed: &mut sealed }, &mut verdict)));
                assert!(!verdict);
                verdict = true;
            }
        }
    }
}
