//! NTS-KE on real sockets: what clients get, good ones and others, and how it is counted.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use nts_engine::admission::Limits;
use nts_engine::aead::AeadId;
use nts_engine::cookies::Keyring;
use nts_engine::ke::{NtpEndpoint, NtpService};
use nts_engine::ke_server::{KeThreads, ServiceAt};
use nts_engine::ntp_server::{Clock, Shared};
use nts_engine::packet::ClockState;
use nts_engine::records::{self, MessageReader, Record};
use nts_engine::tls::{Credentials, PemPair};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};

const P256: &str = include_str!("pairs/p256.pem");
const P384: &str = include_str!("pairs/p384.pem");
const RSA: &str = include_str!("pairs/rsa.pem");
const ED25519: &str = include_str!("pairs/ed25519.pem");
const ED448: &str = include_str!("pairs/ed448.pem");
const PATIENCE: Duration = Duration::from_secs(20);

fn pair(name: &str, pem: &str) -> PemPair {
    PemPair { name: name.into(), host_names: vec![name.to_lowercase()], chain: pem.into(), key: pem.into() }
}

fn credentials(pairs: &[PemPair]) -> Arc<Credentials> {
    Credentials::new(pairs).unwrap().into()
}

fn keyring() -> Arc<Keyring> {
    Keyring::new(&[(2, vec![2; 32]), (1, vec![1; 32])]).unwrap().into()
}

/// Threads that answer at one address.
/// The number by which a place is left.
const PLACE: usize = 7;

struct Served {
    threads: KeThreads,
    address: SocketAddr,
}

impl Served {
    fn new(limits: &Limits) -> Self {
        Self::with(limits, &|_: &str, _: &[String]| Some(NtpService::default()))
    }

    fn with<F: Fn(&str, &[String]) -> Option<NtpService> + Clone + Send + Sync + 'static>(
        limits: &Limits,
        service: &F,
    ) -> Self {
        let state = ClockState {
            leap: 0,
            stratum: 1,
            precision: -20,
            root_delay: 0,
            root_dispersion: 0,
            reference_id: [0; 4],
            reference: 0,
        };
        let shared = Arc::new(Shared {
            keyring: ArcSwap::new(keyring()),
            clock: ArcSwap::from_pointee(Clock { state, offset_ns: 0, good_until: None }),
        });
        let preference = [AeadId::Aes128GcmSiv, AeadId::SivCmac256];
        let threads = KeThreads::start(1, limits, &preference, &shared).unwrap();
        threads.use_credentials(credentials(&[pair("a.example", P256)]));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let service: ServiceAt = Arc::new(service.clone());
        threads.listen(PLACE, vec![listener.into()], &service).unwrap();
        Self { threads, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn count(&self, label: &str) -> u64 {
        let all = self.threads.counts().flat_map(nts_engine::ke_server::Counts::by_label);
        all.filter(|(each, _)| *each == label).map(|(_, count)| count).sum()
    }

    fn open(&self) -> u64 {
        self.threads.counts().map(nts_engine::ke_server::Counts::open).sum()
    }

    fn wait_for(&self, what: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !what(self) {
            assert!(Instant::now() < end, "it did not come to that");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Takes every certificate whose key signs.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("TLS 1.3 only")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn client_offering(name: &str, protocols: &[&str]) -> ClientConnection {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|each| each.as_bytes().to_vec()).collect();
    config.resumption = Resumption::disabled();
    ClientConnection::new(config.into(), ServerName::try_from(name.to_owned()).unwrap()).unwrap()
}

fn client(name: &str) -> ClientConnection {
    client_offering(name, &["ntske/1"])
}

fn request() -> Vec<u8> {
    let mut message = Vec::new();
    Record::critical(records::NEXT_PROTOCOL, &[0, 0]).write(&mut message);
    Record::critical(records::AEAD_ALGORITHM, &[0, 15]).write(&mut message);
    Record::critical(records::END_OF_MESSAGE, &[]).write(&mut message);
    message
}

/// Send plaintext, and read until the server has said that it closes.
fn ask(tls: &mut ClientConnection, stream: &mut TcpStream, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut both = rustls::Stream::new(tls, stream);
    both.write_all(request)?;
    both.read_to_end(&mut answer)?;
    Ok(answer)
}

fn ask_at(served: &Served, name: &str) -> io::Result<(ClientConnection, Vec<u8>)> {
    let (mut tls, mut stream) = (client(name), served.connect());
    let answer = ask(&mut tls, &mut stream, &request())?;
    Ok((tls, answer))
}

/// Records of a message: types and bodies.
fn read(message: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut reader = MessageReader::new(65_536);
    let records = reader.receive(message).unwrap().expect("a whole message");
    records.map(|record| (record.kind, record.body.to_vec())).collect()
}

fn shown(tls: &ClientConnection) -> Vec<u8> {
    tls.peer_certificates().unwrap()[0].to_vec()
}

/// Whether a connection ends by a reset, or otherwise.
fn is_reset(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::ConnectionReset)
}

#[test]
fn a_client_gets_cookies_with_the_keys_of_its_session() {
    let served = Served::new(&Limits::default());
    let (tls, answer) = ask_at(&served, "a.example").unwrap();
    let told = read(&answer);
    assert_eq!(told[..2], [(1, vec![0, 0]), (4, vec![0, 15])]);
    assert_eq!(told.len(), 10);
    for (_, cookie) in &told[2..] {
        let (keys, _) = keyring().open(cookie).unwrap();
        for (direction, key) in [keys.c2s(), keys.s2c()].into_iter().enumerate() {
            let context = [0, 0, 0, 15, u8::try_from(direction).unwrap()];
            let label = b"EXPORTER-network-time-security";
            assert_eq!(tls.export_keying_material([0; 32], label, Some(&context)).unwrap(), key);
        }
    }
    served.wait_for(|served| served.open() == 0);
    assert_eq!(served.count("ok"), 1);
}

#[test]
fn a_client_may_take_its_time_octet_by_octet() {
    let served = Served::new(&Limits::default());
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    stream.set_nodelay(true).unwrap();
    let mut answer = Vec::new();
    let slowly = |tls: &mut ClientConnection, stream: &mut TcpStream| {
        let mut octets = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut octets).unwrap();
        }
        for octet in octets {
            stream.write_all(&[octet]).unwrap();
        }
    };
    slowly(&mut tls, &mut stream);
    while tls.is_handshaking() {
        tls.read_tls(&mut stream).unwrap();
        tls.process_new_packets().unwrap();
    }
    tls.writer().write_all(&request()).unwrap();
    slowly(&mut tls, &mut stream);
    rustls::Stream::new(&mut tls, &mut stream).read_to_end(&mut answer).unwrap();
    assert_eq!(read(&answer).len(), 10);
}

#[test]
fn silence_has_an_end_before_and_after_the_handshake() {
    let served = Served::new(&Limits::default());
    let mut mute = served.connect();
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    let answer = ask(&mut tls, &mut stream, &request()[..7]).unwrap();
    assert_eq!(read(&answer), [(2, vec![0, 1])]);
    assert_eq!(mute.read(&mut [0]).unwrap(), 0);
    assert_eq!([served.count("timeout"), served.count("tls-timeout")], [1, 1]);
    // A peer that does not close is closed.
    served.wait_for(|served| served.open() == 0);
}

#[test]
fn a_request_that_is_cut_short_or_bad() {
    let served = Served::new(&Limits::default());
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    while tls.is_handshaking() {
        tls.complete_io(&mut stream).unwrap();
    }
    tls.send_close_notify();
    assert_eq!(read(&ask(&mut tls, &mut stream, &[]).unwrap()), [(2, vec![0, 1])]);
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    let unknown = [0xbf, 0xff, 0, 0, 0x80, 0, 0, 0];
    assert_eq!(read(&ask(&mut tls, &mut stream, &unknown).unwrap()), [(2, vec![0, 0])]);
    drop(served.connect());
    served.wait_for(|served| served.count("connection-lost") == 1);
    assert_eq!([served.count("cut-short"), served.count("unknown-critical")], [1, 1]);
}

#[test]
fn what_is_not_our_tls_gets_an_alert() {
    let served = Served::new(&Limits::default());
    // A ClientHello of TLS 1.2.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, 0]);
    let (length, whole) = (u8::try_from(hello.len()).unwrap(), u8::try_from(hello.len() + 4).unwrap());
    let old = [&[22, 3, 1, 0, whole, 1, 0, 0, length], &hello[..]].concat();
    for octets in [b"GET / HTTP/1.0\r\n\r\n".to_vec(), old] {
        let mut stream = served.connect();
        stream.write_all(&octets).unwrap();
        let mut alert = Vec::new();
        stream.read_to_end(&mut alert).unwrap();
        assert_eq!((alert[0], alert[5]), (21, 2), "a fatal alert");
    }
    for protocols in [&[][..], &["http/1.1"]] {
        let (mut tls, mut stream) = (client_offering("a.example", protocols), served.connect());
        let error = ask(&mut tls, &mut stream, &request()).unwrap_err().to_string();
        assert!(error.contains("alert"), "{error}");
    }
    assert_eq!(served.count("tls-failed"), 4);
}

#[test]
fn nobody_sends_without_end() {
    let served = Served::new(&Limits::default());
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    while tls.is_handshaking() {
        tls.complete_io(&mut stream).unwrap();
    }
    // A record that nobody knows, each octet in a TLS record of its own.
    for octet in [0x3f, 0xff, 0x30, 0].into_iter().chain([0; 3000]) {
        tls.writer().write_all(&[octet]).unwrap();
        // It may be closed over what we still send.
        let _ = tls.write_tls(&mut stream);
    }
    let _ = stream.read_to_end(&mut Vec::new());
    served.wait_for(|served| served.count("too-long") == 1 && served.open() == 0);
}

#[test]
fn a_flood_leaves_slots_to_others_and_is_reset() {
    let limits = Limits { ke_connections: 64, ke_per_address: 3, ..Limits::default() };
    let served = Served::new(&limits);
    let held: Vec<_> = (0..3).map(|_| served.connect()).collect();
    served.wait_for(|served| served.open() == 3);
    for _ in 0..50 {
        assert!(is_reset(&mut served.connect()));
    }
    assert_eq!((served.open(), served.count("too-many-of-address")), (3, 50));
    drop(held);
    served.wait_for(|served| served.open() == 0);
    assert_eq!(served.count("connection-lost"), 3);
    ask_at(&served, "a.example").unwrap();
}

#[test]
fn refusals_by_prefix_and_rate_are_told_apart() {
    let served = Served::new(&Limits { deny: vec!["127.0.0.0/8".parse().unwrap()], ..Limits::default() });
    assert!(is_reset(&mut served.connect()));
    assert_eq!(served.count("denied"), 1);
    let served = Served::new(&Limits { ke_interval_ns: Some(3_600_000_000_000), ke_burst: 1, ..Limits::default() });
    ask_at(&served, "a.example").unwrap();
    assert!(is_reset(&mut served.connect()));
    assert_eq!(served.count("rate-limited"), 1);
}

#[test]
fn many_at_once_are_all_served() {
    let served = Served::new(&Limits::default());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..25).for_each(|_| drop(ask_at(&served, "a.example").unwrap())));
        }
    });
    assert_eq!(served.count("ok"), 200);
    served.wait_for(|served| served.open() == 0);
}

#[test]
fn who_began_with_a_certificate_ends_with_it() {
    let served = Served::new(&Limits::default());
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    served.wait_for(|served| served.open() == 1);
    served.threads.use_credentials(credentials(&[pair("a.example", P384)]));
    ask(&mut tls, &mut stream, &request()).unwrap();
    let (later, _) = ask_at(&served, "a.example").unwrap();
    assert_ne!(shown(&tls), shown(&later));
    assert_eq!(served.count("ok"), 2);
}

#[test]
fn a_place_that_is_left_is_closed_and_its_connections_go_on() {
    let served = Served::new(&Limits::default());
    let (mut tls, mut stream) = (client("a.example"), served.connect());
    served.wait_for(|served| served.open() == 1);
    served.threads.leave(PLACE).unwrap();
    assert_eq!(TcpStream::connect(served.address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(read(&ask(&mut tls, &mut stream, &request()).unwrap()).len(), 10);
}

#[test]
fn closing_ends_what_is_under_way() {
    let served = Served::new(&Limits::default());
    let mut stream = served.connect();
    served.wait_for(|served| served.open() == 1);
    assert_eq!(served.threads.alive(), 1);
    served.threads.close();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(served.threads.alive(), 0);
    assert!(served.threads.leave(PLACE).is_err());
}

#[test]
fn each_kind_of_key_is_shown_to_who_asks_for_its_name() {
    let served = Served::new(&Limits::default());
    let all = [("A.example", P256), ("b.example", P384), ("c.example", RSA), ("d.example", ED25519)];
    let pairs: Vec<_> = all.iter().map(|(name, pem)| pair(name, pem)).collect();
    served.threads.use_credentials(credentials(&pairs));
    let mut certificates = std::collections::HashSet::new();
    for (name, _) in all {
        let (tls, _) = ask_at(&served, name).unwrap();
        certificates.insert(shown(&tls));
    }
    assert_eq!(certificates.len(), 4);
    for name in ["other.example", "192.0.2.1"] {
        assert!(ask_at(&served, name).unwrap_err().to_string().contains("alert"), "{name}");
    }
    // The only one there is, is shown to all.
    served.threads.use_credentials(credentials(&[pair("b.example", P384)]));
    ask_at(&served, "other.example").unwrap();
    ask_at(&served, "192.0.2.1").unwrap();
    served.threads.use_credentials(credentials(&[]));
    assert!(ask_at(&served, "b.example").is_err());
}

#[test]
fn pairs_that_cannot_be_used_are_named() {
    let said = |pair: PemPair| Credentials::new(&[pair]).map(|_| ()).unwrap_err().to_string();
    let mixed = PemPair { key: P384.into(), ..pair("a.example", P256) };
    assert_eq!(said(mixed), "a.example: certificate and key do not belong together");
    assert!(said(pair("e.example", ED448)).starts_with("e.example: a kind of key that native packets do not take"));
    assert!(said(PemPair { key: String::new(), ..pair("a.example", P256) }).contains("no private key"));
    assert!(said(PemPair { chain: String::new(), ..pair("a.example", P256) }).contains("no certificate chain"));
}

#[test]
fn where_ntp_is_is_asked_once_for_each_address_and_certificate() {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let told = |local: &str, names: &[String]| {
        let asked = u16::try_from(ASKED.fetch_add(1, SeqCst)).unwrap();
        assert_eq!((local, names), ("127.0.0.1", &["a.example".to_owned()][..]));
        Some(NtpService { default: NtpEndpoint { host: None, port: 1000 + asked }, others: vec![] })
    };
    let served = Served::with(&Limits::default(), &told);
    let port = || read(&ask_at(&served, "any.example").unwrap().1)[2].clone();
    assert_eq!([port(), port()], [(7, vec![3, 232]), (7, vec![3, 232])]);
    served.threads.forget_services().unwrap();
    assert_eq!(port(), (7, vec![3, 233]));
}

#[test]
fn faults_of_our_own_are_told_and_end_one_connection_only() {
    let served = Served::with(&Limits::default(), &|_: &str, _: &[String]| None);
    let (_, answer) = ask_at(&served, "a.example").unwrap();
    assert_eq!(read(&answer), [(2, vec![0, 2])]);
    let served = Served::with(&Limits::default(), &|_: &str, _: &[String]| panic!("as the test wants it"));
    for _ in 0..2 {
        assert!(ask_at(&served, "a.example").is_err());
    }
    assert_eq!((served.count("internal-error"), served.threads.alive()), (2, 1));
    served.wait_for(|served| served.open() == 0);
}
