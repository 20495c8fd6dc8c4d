//! Keeps an NTS-KE server busy with key establishments: a client of `bench`.
//!
//! `establish SERVER CERTIFICATE CLIENTS SECONDS`: so many clients at a time do one exchange after the other, TCP and all.
//! Each answer has to bring eight cookies. One JSON object tells what came of it.
//!
//! A client of one core shall be quicker than the server it asks. So the certificate, a file in PEM, is compared octet by
//! octet and its signature is not verified: that is what a client does most of the time. The keys are checked all the
//! same, since nothing could be read with wrong ones.

use std::env::args;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::process::exit;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};

/// Records: Next Protocol, which is NTP; AEAD algorithm 15; End of Message.
const REQUEST: [u8; 16] = [0x80, 1, 0, 2, 0, 0, 0x80, 4, 0, 2, 0, 15, 0x80, 0, 0, 0];
const NEW_COOKIE: u16 = 5;
const END_OF_MESSAGE: u16 = 0x8000;
const COOKIES: usize = 8;
/// A server that takes longer for anything has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The one certificate that is expected.
#[derive(Debug)]
struct Expected(CertificateDer<'static>);

impl ServerCertVerifier for Expected {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if *shown == self.0 { Ok(ServerCertVerified::assertion()) } else { Err(Error::General("another".into())) }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// One exchange under way.
struct Client {
    stream: TcpStream,
    tls: ClientConnection,
    has_asked: bool,
    answer: Vec<u8>,
}

impl Client {
    fn begin(server: SocketAddr, config: &Arc<ClientConfig>, poll: &Poll, token: Token) -> io::Result<Self> {
        let mut stream = TcpStream::connect(server)?;
        poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        let tls = ClientConnection::new(config.clone(), server.ip().into()).map_err(io::Error::other)?;
        Ok(Self { stream, tls, has_asked: false, answer: Vec::new() })
    }

    /// Go on as far as the server lets us; whether the exchange is over.
    fn go_on(&mut self) -> io::Result<bool> {
        loop {
            while self.tls.wants_write() {
                match self.tls.write_tls(&mut self.stream) {
                    Err(error) if is_not_yet(&error) => return Ok(false),
                    done => done?,
                };
            }
            match self.tls.read_tls(&mut self.stream) {
                Err(error) if is_not_yet(&error) => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                done => done?,
            };
            self.tls.process_new_packets().map_err(io::Error::other)?;
            if !self.has_asked && !self.tls.is_handshaking() {
                self.tls.writer().write_all(&REQUEST)?;
                self.has_asked = true;
            }
            match self.tls.reader().read_to_end(&mut self.answer) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            // Not the server's close: chronyd's is a second write, which waits for our acknowledgement.
            match self.cookies() {
                Some(COOKIES) => return Ok(true),
                Some(_) => return Err(io::Error::other("an answer without eight cookies")),
                None => {}
            }
        }
    }

    /// How many cookies the answer brings, once it is whole.
    fn cookies(&self) -> Option<usize> {
        let (mut found, mut rest) = (0, &self.answer[..]);
        while let [high, low, long, short, tail @ ..] = rest {
            match u16::from_be_bytes([*high, *low]) {
                END_OF_MESSAGE => return Some(found),
                kind => found += usize::from(kind == NEW_COOKIE),
            }
            rest = tail.get(usize::from(u16::from_be_bytes([*long, *short]))..)?;
        }
        None
    }
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
}

fn main() {
    let given: Vec<String> = args().skip(1).collect();
    let [server, certificate, clients, seconds] = &given[..] else {
        fail("establish SERVER CERTIFICATE CLIENTS SECONDS");
    };
    let (Ok(server), Ok(clients), Ok(seconds)) = (server.parse(), clients.parse(), seconds.parse::<f64>()) else {
        fail("not an address and port, a number and seconds");
    };
    let Ok(certificate) = CertificateDer::from_pem_file(certificate) else { fail("no certificate in PEM there") };
    match run(server, certificate, clients, Duration::from_secs_f64(seconds.clamp(0.0, 3600.0))) {
        Ok((established, took)) => {
            // Nanoseconds on a processor come first there.
            let spent = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
            let (seconds, cpu_ns) = (took.as_secs_f64(), spent.split(' ').next().unwrap_or("0"));
            println!(r#"{{"established": {established}, "seconds": {seconds}, "cpu_ns": {cpu_ns}}}"#);
        }
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(why: &str) -> ! {
    eprintln!("establish: {why}");
    exit(1);
}

fn run(
    server: SocketAddr,
    certificate: CertificateDer<'static>,
    clients: usize,
    duration: Duration,
) -> io::Result<(usize, Duration)> {
    let mut config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Expected(certificate)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"ntske/1".to_vec()];
    config.resumption = Resumption::disabled();
    let config = Arc::new(config);
    let mut poll = Poll::new()?;
    let begin = |poll: &Poll, place: usize| Client::begin(server, &config, poll, Token(place));
    let mut running: Vec<_> = (0..clients).map(|place| begin(&poll, place)).collect::<io::Result<_>>()?;
    let mut events = Events::with_capacity(clients);
    let (started, mut established) = (Instant::now(), 0);
    while started.elapsed() < duration {
        poll.poll(&mut events, Some(PATIENCE))?;
        if events.is_empty() {
            return Err(ErrorKind::TimedOut.into());
        }
        for event in &events {
            let place = event.token().0;
            if running[place].go_on()? {
                established += 1;
                running[place] = begin(&poll, place)?;
            }
        }
    }
    Ok((established, started.elapsed()))
}
