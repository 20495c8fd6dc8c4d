//! The packet engine of `pool-agent`: NTS-KE and NTP for many clients, by the rules of `nts_core`.
//!
//! Each module mirrors one of the Python package of the same name, which is the reference (`access` and `admission` are
//! in its `ratelimit`); tests feed both the same octets. Sockets are bound by the agent and handed over; threads of this
//! crate answer on them. What is shared with the threads (keyring, clock, certificates) is swapped whole and read without
//! a lock.

#![deny(unsafe_code)]

pub mod access;
pub mod admission;
pub mod aead;
pub mod batch;
pub mod cookies;
pub mod ke;
pub mod ke_server;
mod labels;
pub mod ntp_server;
pub mod ntptime;
pub mod packet;
#[cfg(feature = "python")]
mod python;
mod ratelimit;
pub mod records;
pub mod server;
pub mod siv;
pub mod threads;
pub mod tls;
