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
const LONGEST_SECRET: usize = 2 * LONGEST_KEY;

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
    pub fn recognise<'a>(&'a self, cookie: &[u8]) -> Option<Recognised<'a>> {
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
        Some(Recognised { algorithm, key: &self.keys[position].key, role })
    }

    fn position(&self, id: u16) -> Option<usize> {
        // Nearly all cookies are of the key that seals.
        if self.keys[1].id == id { Some(1) } else { self.keys.iter().position(|key| key.id == id) }
    }

    /// The session keys in one cookie, and the role of the key that opened it.
    #[must_use]
    pub fn open(&self, cookie: &[u8]) -> Option<(SessionKeys, Role)> {
        let recognised = self.recognise(cookie)?;
        let mut secret = zeroize::Zeroizing::new([0; LONGEST_SECRET]);
        let length = 2 * recognised.algorithm.key_length();
        let text = &mut secret[..length];
        text.copy_from_slice(&cookie[CLEAR + TAG..]);
        let mut job = [recognised.opening(cookie, text)];
        siv::open(&mut job);
        if !job[0].is_authentic {
            return None;
        }
        Some((SessionKeys::new(recognised.algorithm, &secret[..length])?, recognised.role))
    }

    /// The head of a new cookie: what stands before its nonce.
    #[must_use]
    pub fn head(&self, algorithm: AeadId) -> [u8; HEAD] {
        let [high, low] = self.keys[1].id.to_be_bytes();
        [VERSION, algorithm as u8, high, low]
    }

    /// Seal a new cookie for a client's session keys into `room` of `length(keys.aead)` octets.
    pub fn seal(&self, keys: &SessionKeys, nonce: &[u8; NONCE], room: &mut [u8]) {
        let head = self.head(keys.aead);
        room[..HEAD].copy_from_slice(&head);
        room[HEAD..CLEAR].copy_from_slice(nonce);
        let (tag, text) = room[CLEAR..].split_at_mut(TAG);
        text.copy_from_slice(keys.both());
        let mut job = [siv::Sealing { key: &self.keys[1].key, data: &head, nonce, text, tag: [0; TAG] }];
        siv::seal(&mut job);
        tag.copy_from_slice(&job[0].tag);
    }

    /// The key that seals.
    #[must_use]
    pub fn sealing(&self) -> &SivKey {
        &self.keys[1].key
    }
}

/// A cookie that says it is of one of our keys.
pub struct Recognised<'a> {
    pub algorithm: AeadId,
    pub key: &'a SivKey,
    pub role: Role,
}

impl<'a> Recognised<'a> {
    /// The work to open it; `text` holds what is behind the tag.
    #[must_use]
    pub fn opening(&self, cookie: &'a [u8], text: &'a mut [u8]) -> siv::Opening<'a> {
        let mut tag = [0; TAG];
        tag.copy_from_slice(&cookie[CLEAR..CLEAR + TAG]);
        siv::Opening {
            key: self.key,
            data: &cookie[..HEAD],
            nonce: &cookie[HEAD..CLEAR],
            text,
            tag,
            is_authentic: false,
        }
    }
}
