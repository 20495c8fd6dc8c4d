//! Cookies (RFC 8915 section 6), as `nts_core.cookies` makes them.
//!
//! ```text
//! version 1 | AEAD id 1 | key id 2 | nonce 16 | tag 16 | C2S key, S2C key
//! ```

use crate::aead::{AeadId, LONGEST_KEY, SessionKeys};
use crate::siv::{self, SivKey, TAG};

/// Octets of the nonce in a cookie.
pub const NONCE: usize = 16;
/// What is not encrypted: version, algorithm and key id; then the nonce.
const HEAD: usize = 4;
const CLEAR: usize = HEAD + NONCE;
const VERSION: u8 = 1;
/// Octets of the longest cookie.
pub const LONGEST: usize = CLEAR + TAG + 2 * LONGEST_KEY;
/// What a client may hold, and what a server gives in one answer (section 5.7).
pub const MAX_COOKIES: usize = 8;

/// Octets of our cookies for sessions of one algorithm.
#[must_use]
pub const fn length(algorithm: AeadId) -> usize {
    CLEAR + TAG + 2 * algorithm.key_length()
}

/// What a master key is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Next,
    Sealing,
    Retired,
}

struct MasterKey {
    id: u16,
    key: SivKey,
}

/// Master keys, newest first: the next one, the sealing one, the retired ones; immutable.
pub struct Keyring {
    keys: Vec<MasterKey>,
}

impl Keyring {
    /// From ids and keys of 32 octets, in the order of `nts_core.cookies.Keyring`: the second one seals. None when
    /// there are fewer than two, two with one id, or one of another length.
    #[must_use]
    pub fn new(keys: &[(u16, impl AsRef<[u8]>)]) -> Option<Self> {
        let distinct: std::collections::HashSet<u16> = keys.iter().map(|(id, _)| *id).collect();
        if keys.len() < 2 || distinct.len() != keys.len() {
            return None;
        }
        let ready = keys.iter().map(|(id, secret)| {
            let secret = secret.as_ref();
            let is_right = secret.len() == AeadId::SivCmac256.key_length();
            Some(MasterKey { id: *id, key: SivKey::new(secret).filter(|_| is_right)? })
        });
        Some(Self { keys: ready.collect::<Option<_>>()? })
    }

    /// What key made a cookie, None when it is none of ours or the cookie has no form of ours.
    #[must_use]
    #[inline]
    pub fn recognise<'a>(&'a self, cookie: &'a [u8]) -> Option<Recognised<'a>> {
        let &[VERSION, algorithm, high, low, ..] = cookie else { return None };
        let algorithm = AeadId::of(algorithm.into())?;
        if cookie.len() != length(algorithm) {
            return None;
        }
        let id = u16::from_be_bytes([high, low]);
        let position = self.position(id)?;
        let role = match position {
            0 => Role::Next,
            1 => Role::Sealing,
            _ => Role::Retired,
        };
        let keys = SessionKeys::new(algorithm, &cookie[CLEAR + TAG..])?;
        Some(Recognised { role, keys, key: &self.keys[position].key, cookie })
    }

    fn position(&self, id: u16) -> Option<usize> {
        // Nearly all cookies are of the key that seals.
        if self.keys[1].id == id { Some(1) } else { self.keys.iter().position(|key| key.id == id) }
    }

    /// The session keys in one cookie, and the role of the key that opened it.
    #[must_use]
    pub fn open(&self, cookie: &[u8]) -> Option<(SessionKeys, Role)> {
        let (mut recognised, mut is_authentic) = (self.recognise(cookie)?, false);
        siv::open(&mut [recognised.opening(&mut is_authentic)]);
        is_authentic.then_some((recognised.keys, recognised.role))
    }

    /// Seal a new cookie for a client's session keys into `room` of `length(keys.aead)` octets.
    pub fn seal(&self, keys: &SessionKeys, nonce: &[u8; NONCE], room: &mut [u8]) {
        siv::seal(&mut [self.sealing(keys, nonce, room)]);
    }

    /// The work of `seal`, to be done with more of its kind.
    pub fn sealing<'a>(&'a self, keys: &SessionKeys, nonce: &[u8; NONCE], room: &'a mut [u8]) -> siv::Sealing<'a> {
        let MasterKey { id, key } = &self.keys[1];
        let (clear, sealed) = room.split_at_mut(CLEAR);
        let (head, place) = clear.split_at_mut(HEAD);
        let [high, low] = id.to_be_bytes();
        head.copy_from_slice(&[VERSION, keys.aead as u8, high, low]);
        place.copy_from_slice(nonce);
        let (tag, text) = sealed.split_at_mut(TAG);
        text.copy_from_slice(keys.both());
        siv::Sealing { key, data: head, nonce: place, tag, text }
    }
}

/// A cookie that says it is of one of our keys.
pub struct Recognised<'a> {
    pub role: Role,
    /// Encrypted until the cookie is open.
    pub keys: SessionKeys,
    key: &'a SivKey,
    cookie: &'a [u8],
}

impl Recognised<'_> {
    /// The work to open it.
    pub fn opening<'b>(&'b mut self, is_authentic: &'b mut bool) -> siv::Opening<'b> {
        let (clear, sealed) = self.cookie.split_at(CLEAR);
        let (data, nonce) = clear.split_at(HEAD);
        let mut tag = [0; TAG];
        tag.copy_from_slice(&sealed[..TAG]);
        siv::Opening { key: self.key, data, nonce, tag, text: self.keys.both_mut(), is_authentic }
    }
}
