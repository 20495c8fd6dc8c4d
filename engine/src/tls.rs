//! TLS 1.3 of the server, without sockets (RFC 8915 section 3), as `nts_core.tls` has it: octets in, octets out.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::sync::Arc;

use rustls::CipherSuite;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig, ServerConnection};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{Error, InconsistentKeys};

const ALPN: &[u8] = b"ntske/1";
/// Section 4.3; the deployed label, without `/1`.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-network-time-security";
/// Octets that a session holds for a peer that does not read: our longest flight and a message fit several times.
const MAX_UNSENT: usize = 64 * 1024;

/// A certificate chain and its key in PEM, leaf first, and the names that they are for.
pub struct PemPair {
    /// The name that clients ask for (SNI).
    pub name: String,
    /// The certificate's host names.
    pub host_names: Vec<String>,
    /// PEM.
    pub chain: String,
    /// PEM, not encrypted.
    pub key: String,
}

/// Why a pair cannot be used, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsError(String);

impl fmt::Display for TlsError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for TlsError {}

#[derive(Debug)]
struct Certificate {
    host_names: Arc<[String]>,
    certified: Arc<CertifiedKey>,
}

impl Certificate {
    fn new(pair: &PemPair, provider: &CryptoProvider) -> Result<Self, TlsError> {
        let refused = |why: &str| TlsError(why.into());
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pair.chain.as_bytes()).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(|| refused("no certificate chain"))?;
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes())
            .map_err(|_| refused("no private key, or one that is encrypted"))?;
        let key = provider.key_provider.load_private_key(key).map_err(|_| {
            refused(
                "a kind of key that native packets do not take: use P-256, P-384, P-521, RSA or Ed25519, or set \
                 engine.packets to python",
            )
        })?;
        let certified = CertifiedKey::new(chain, key);
        certified.keys_match().map_err(|error| match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                refused("certificate and key do not belong together")
            }
            other => refused(&format!("not a certificate that can be served: {other}")),
        })?;
        Ok(Self { host_names: pair.host_names.as_slice().into(), certified: certified.into() })
    }
}

/// The certificates of each name that is served here.
///
/// A client gets that of the name that it asks for (SNI). One that asks for another name, or for none, gets the only one
/// there is; where there are several it gets an alert, since none of them is what it wants.
#[derive(Debug)]
struct Certificates(HashMap<String, Certificate>);

impl Certificates {
    fn choose(&self, name: Option<&str>) -> Option<&Certificate> {
        let mut all = self.0.values();
        match (all.next(), all.next()) {
            (only, None) => only,
            _ => self.0.get(name?),
        }
    }
}

impl ResolvesServerCert for Certificates {
    /// Without a certificate the handshake ends with an alert. So does one that offers no protocol: `rustls` would go on.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let chosen = hello.alpn().and_then(|_| self.choose(hello.server_name()));
        chosen.map(|certificate| certificate.certified.clone())
    }
}

/// Certificates ready for handshakes; replaced as a whole when one of them changes.
pub struct Credentials {
    certificates: Arc<Certificates>,
    config: Arc<ServerConfig>,
}

impl Credentials {
    /// From all pairs that are served; with none, every handshake ends with an alert.
    ///
    /// # Errors
    /// A pair that does not belong together, or of a kind that is not taken, by its name.
    pub fn new(pairs: &[PemPair]) -> Result<Self, TlsError> {
        let mut provider = aws_lc_rs::default_provider();
        // SHA-256 has instructions of its own, SHA-384 has not; no key exchange here is stronger than AES-128.
        provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        let provider = Arc::new(provider);
        let by_name = pairs.iter().map(|pair| {
            let named = |error: TlsError| {
                if pair.name.is_empty() { error } else { TlsError(format!("{}: {error}", pair.name)) }
            };
            Ok((pair.name.to_lowercase(), Certificate::new(pair, &provider).map_err(named)?))
        });
        let certificates = Arc::new(Certificates(by_name.collect::<Result<_, _>>()?));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| TlsError(error.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(certificates.clone());
        config.ignore_client_order = true;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // One exchange a session: there is nothing to resume.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { certificates, config: config.into() })
    }
}

/// The session is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// One TLS session. Feed what the network brings to `receive`, and `flush` after each call, also when it failed: there may
/// be an alert.
pub struct TlsChannel {
    connection: ServerConnection,
    credentials: Arc<Credentials>,
    is_closed_by_peer: bool,
}

impl TlsChannel {
    /// Waits for a client.
    ///
    /// # Errors
    /// When the settings are none of TLS's.
    pub fn new(credentials: Arc<Credentials>) -> Result<Self, Broken> {
        let mut connection = ServerConnection::new(credentials.config.clone()).map_err(|_| Broken)?;
        connection.set_buffer_limit(Some(MAX_UNSENT));
        Ok(Self { connection, credentials, is_closed_by_peer: false })
    }

    /// Whether the handshake is over.
    #[must_use]
    pub fn is_established(&self) -> bool {
        !self.connection.is_handshaking()
    }

    /// Whether the peer has said `close_notify`.
    #[must_use]
    pub const fn is_closed_by_peer(&self) -> bool {
        self.is_closed_by_peer
    }

    /// The host names of the certificate that was shown.
    #[must_use]
    pub fn host_names(&self) -> Arc<[String]> {
        let shown = self.credentials.certificates.choose(self.connection.server_name());
        shown.map_or_else(|| [].into(), |certificate| certificate.host_names.clone())
    }

    /// Put what has come behind `plaintext`.
    ///
    /// # Errors
    /// When the session is broken.
    pub fn receive(&mut self, mut ciphertext: &[u8], plaintext: &mut Vec<u8>) -> Result<(), Broken> {
        // After `close_notify` nothing is read.
        while !ciphertext.is_empty() && !self.is_closed_by_peer {
            self.connection.read_tls(&mut ciphertext).map_err(|_| Broken)?;
            let state = self.connection.process_new_packets().map_err(|_| Broken)?;
            let (start, count) = (plaintext.len(), state.plaintext_bytes_to_read());
            self.is_closed_by_peer = state.peer_has_closed();
            plaintext.resize(start + count, 0);
            self.connection.reader().read_exact(&mut plaintext[start..]).map_err(|_| Broken)?;
        }
        // A handshake that is called off is none.
        if self.is_closed_by_peer && !self.is_established() { Err(Broken) } else { Ok(()) }
    }

    /// Encrypt the one message that we send, and `close_notify`, which each side SHALL say after its message (section 4).
    pub fn finish(&mut self, plaintext: &[u8]) {
        // It goes to memory; what is beyond the limit is cut off.
        let _ = self.connection.writer().write_all(plaintext);
        self.connection.send_close_notify();
    }

    /// Write what there is to be sent; whether that was all.
    ///
    /// # Errors
    /// Those of the writer but `WouldBlock`.
    pub fn flush(&mut self, to: &mut impl io::Write) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Fill `key` with keying material under RFC 8915's label.
    ///
    /// # Errors
    /// Before the handshake is over.
    pub fn export(&self, context: &[u8], key: &mut [u8]) -> Result<(), Broken> {
        self.connection.export_keying_material(key, EXPORTER_LABEL, Some(context)).map(|_| ()).map_err(|_| Broken)
    }
}
