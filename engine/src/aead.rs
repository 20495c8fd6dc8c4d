//! AEAD algorithms as NTS uses them (RFC 8915 section 5.1), as `nts_core.aead` has them.

use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::{Aes128GcmSiv, Nonce, Tag};

use crate::siv::{self, SivKey, TAG};

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
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct SessionKeys {
    #[zeroize(skip)]
    pub aead: AeadId,
    keys: [u8; 2 * LONGEST_KEY],
}

impl SessionKeys {
    /// From both keys one behind the other, client to server first, `2 * key_length` octets.
    #[must_use]
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

    /// Both, one behind the other, as they are in a cookie.
    #[must_use]
    pub fn both(&self) -> &[u8] {
        &self.keys[..2 * self.aead.key_length()]
    }
}

/// One key of AEAD_AES_128_GCM_SIV.
pub struct GcmSivKey(Aes128GcmSiv);

impl GcmSivKey {
    /// From 16 octets.
    #[must_use]
    pub fn new(key: &[u8]) -> Option<Self> {
        Aes128GcmSiv::new_from_slice(key).ok().map(Self)
    }

    /// Encrypt `text` in place; its tag.
    #[must_use]
    pub fn seal(&self, nonce: &[u8; 12], data: &[u8], text: &mut [u8]) -> [u8; TAG] {
        let nonce = Nonce::from(*nonce);
        // It fails for lengths beyond 2^36 octets only.
        self.0.encrypt_inout_detached(&nonce, data, text.into()).map(Into::into).unwrap_or([0; TAG])
    }

    /// Decrypt `text` in place; whether it is authentic.
    #[must_use]
    pub fn open(&self, nonce: &[u8; 12], data: &[u8], text: &mut [u8], tag: [u8; TAG]) -> bool {
        let (nonce, tag) = (Nonce::from(*nonce), Tag::from(tag));
        self.0.decrypt_inout_detached(&nonce, data, text.into(), &tag).is_ok()
    }
}

/// One key of any algorithm.
pub enum Aead {
    /// Sealed and opened several at a time: see `siv`.
    Siv(SivKey),
    GcmSiv(GcmSivKey),
}

impl Aead {
    /// None when the key has another length than the algorithm's.
    #[must_use]
    pub fn new(algorithm: AeadId, key: &[u8]) -> Option<Self> {
        if key.len() != algorithm.key_length() {
            return None;
        }
        match algorithm {
            AeadId::Aes128GcmSiv => GcmSivKey::new(key).map(Self::GcmSiv),
            _ => SivKey::new(key).map(Self::Siv),
        }
    }

    /// Open one ciphertext in the form the algorithm gives it (tag first for SIV, last for GCM-SIV), in place.
    /// The plaintext's range in `sealed`, None when key, nonce, data and tag do not belong together.
    #[must_use]
    pub fn open(&self, nonce: &[u8], data: &[u8], sealed: &mut [u8]) -> Option<std::ops::Range<usize>> {
        let length = sealed.len().checked_sub(TAG)?;
        match self {
            Self::Siv(key) => {
                let (tag, text) = sealed.split_at_mut(TAG);
                let tag = (&*tag).try_into().ok()?;
                let mut job = [siv::Opening { key, data, nonce, text, tag, is_authentic: false }];
                siv::open(&mut job);
                job[0].is_authentic.then_some(TAG..TAG + length)
            }
            Self::GcmSiv(key) => {
                let nonce = nonce.try_into().ok()?;
                let (text, tag) = sealed.split_at_mut(length);
                key.open(nonce, data, text, (&*tag).try_into().ok()?).then_some(0..length)
            }
        }
    }

    /// Seal the plaintext in `room`, which has `TAG` octets more than it: before it for SIV, behind it for GCM-SIV
    /// (see `text_in`).
    pub fn seal(&self, nonce: &[u8], data: &[u8], room: &mut [u8]) {
        match self {
            Self::Siv(key) => {
                let (tag, text) = room.split_at_mut(TAG);
                let mut job = [siv::Sealing { key, data, nonce, text, tag: [0; TAG] }];
                siv::seal(&mut job);
                tag.copy_from_slice(&job[0].tag);
            }
            Self::GcmSiv(key) => {
                let (text, tag) = room.split_at_mut(room.len() - TAG);
                let mut exact = [0; 12];
                exact.copy_from_slice(&nonce[..12]);
                tag.copy_from_slice(&key.seal(&exact, data, text));
            }
        }
    }
}

/// Where the plaintext stands in the room of a ciphertext of `length` octets, tag included.
#[must_use]
pub const fn text_in(algorithm: AeadId, length: usize) -> std::ops::Range<usize> {
    match algorithm {
        AeadId::Aes128GcmSiv => 0..length - TAG,
        _ => TAG..length,
    }
}
