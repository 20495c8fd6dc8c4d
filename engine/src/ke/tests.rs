use super::*;

const PROTOCOLS: Record = Record::critical(records::NEXT_PROTOCOL, &[0, 0]);
const SIV: Record = Record::critical(records::AEAD_ALGORITHM, &[0, 15]);
const ALL: Record = Record::critical(records::AEAD_ALGORITHM, &[0, 15, 0, 16, 0, 17, 0, 30]);
const COMPLIANT: Record = Record::new(records::COMPLIANT_128GCM_EXPORT, &[]);

/// A key that tells its context: what the octets are is its place, what they are added to the context's.
struct Told;

impl Session for Told {
    fn export(&mut self, context: &[u8], key: &mut [u8]) -> Result<(), NoKeys> {
        assert_eq!(context.len(), 5);
        let told = context[3].wrapping_mul(2).wrapping_add(context[4]);
        key.fill(told);
        Ok(())
    }

    fn random(&mut self, room: &mut [u8]) {
        for (octet, number) in room.iter_mut().zip(0..) {
            *octet = number;
        }
    }
}

struct Broken;

impl Session for Broken {
    fn export(&mut self, _context: &[u8], _key: &mut [u8]) -> Result<(), NoKeys> {
        Err(NoKeys)
    }

    fn random(&mut self, _room: &mut [u8]) {}
}

fn keyring() -> Arc<Keyring> {
    Keyring::new(&[(2, vec![2; 32]), (1, vec![1; 32])]).unwrap().into()
}

fn server(service: NtpService) -> KeServer {
    use AeadId::{Aes128GcmSiv, SivCmac256, SivCmac384, SivCmac512};
    let preference = [Aes128GcmSiv, SivCmac256, SivCmac512, SivCmac384].into();
    KeServer::new(KeTerms { keyring: keyring(), service: service.into(), preference })
}

fn endpoint(host: &str, port: u16) -> NtpEndpoint {
    NtpEndpoint { host: Some(host.to_owned()), port }
}

fn message(records: &[Record]) -> Vec<u8> {
    KeReply::new(Outcome::Ok, records).octets
}

fn asked(service: NtpService, request: &[Record]) -> KeReply {
    server(service).receive(&message(request), &mut Told).unwrap()
}

fn refused(request: &[Record]) -> (&'static str, Vec<u8>) {
    let reply = asked(NtpService::default(), request);
    (reply.outcome.label(), reply.octets)
}

fn told(octets: &[u8]) -> Vec<(u16, Vec<u8>, bool)> {
    let mut reader = MessageReader::new(65_536);
    let records = reader.receive(octets).unwrap().unwrap();
    records.map(|record| (record.kind, record.body.to_vec(), record.critical)).collect()
}

#[test]
fn a_good_request_gets_eight_cookies_that_open() {
    let reply = asked(NtpService::default(), &[PROTOCOLS, SIV]);
    assert_eq!(reply.outcome.label(), "ok");
    let told = told(&reply.octets);
    assert_eq!(told[..2], [(1, vec![0, 0], true), (4, vec![0, 15], true)]);
    assert_eq!(told.len(), 10);
    for (number, (kind, cookie, critical)) in (0..).zip(&told[2..]) {
        assert_eq!((*kind, *critical, cookie[4]), (5, false, 16 * number));
        let (keys, _) = keyring().open(cookie).unwrap();
        assert_eq!((keys.c2s(), keys.s2c()), ([30; 32].as_slice(), [31; 32].as_slice()));
    }
}

#[test]
fn the_algorithm_and_how_its_keys_are_exported() {
    let gcm = Record::critical(records::AEAD_ALGORITHM, &[0, 30]);
    for (request, aead, named, is_echoed) in [
        (&[PROTOCOLS, ALL, COMPLIANT][..], 30, 30, true),
        (&[PROTOCOLS, ALL], 15, 15, false),
        (&[PROTOCOLS, gcm], 30, 15, false),
        (&[PROTOCOLS, SIV, COMPLIANT], 15, 15, false),
        (&[Record::new(records::AEAD_ALGORITHM, &[1, 0, 0, 16, 0, 17]), PROTOCOLS], 17, 17, false),
    ] {
        let told = told(&asked(NtpService::default(), request).octets);
        assert_eq!(told[1].1, [0, aead]);
        assert_eq!(told[2] == (1024, vec![], false), is_echoed);
        let (keys, _) = keyring().open(&told.last().unwrap().1).unwrap();
        assert_eq!((keys.aead as u8, keys.c2s()[0], keys.s2c()[0]), (aead, 2 * named, 2 * named + 1));
    }
}

#[test]
fn what_is_refused_and_how() {
    let unknown = Record::critical(0x3fff, b"what");
    let bad = ("bad-request", message(&[Record::critical(records::ERROR, &[0, 1])]));
    assert_eq!(
        refused(&[PROTOCOLS, unknown]),
        ("unknown-critical", message(&[Record::critical(records::ERROR, &[0, 0])]))
    );
    assert_eq!(
        refused(&[Record::critical(records::NEXT_PROTOCOL, &[0, 9]), SIV]),
        ("no-protocol", message(&[Record::critical(records::NEXT_PROTOCOL, &[])]))
    );
    assert_eq!(
        refused(&[PROTOCOLS, Record::critical(records::AEAD_ALGORITHM, &[0, 99])]),
        ("no-aead", message(&[PROTOCOLS, Record::critical(records::AEAD_ALGORITHM, &[])]))
    );
    for request in [
        &[][..],
        &[SIV],
        &[PROTOCOLS],
        &[PROTOCOLS, PROTOCOLS, SIV],
        &[PROTOCOLS, SIV, SIV, unknown],
        &[Record::critical(records::NEXT_PROTOCOL, &[]), SIV],
        &[Record::critical(records::NEXT_PROTOCOL, &[0]), SIV],
        &[PROTOCOLS, Record::critical(records::AEAD_ALGORITHM, &[])],
        &[PROTOCOLS, Record::critical(records::AEAD_ALGORITHM, &[0, 15, 0])],
        &[PROTOCOLS, SIV, Record::new(records::WARNING, &[0, 0])],
        &[PROTOCOLS, SIV, Record::new(records::NEW_COOKIE, b"cookie")],
        &[PROTOCOLS, SIV, Record::new(records::COMPLIANT_128GCM_EXPORT, b"x")],
        &[PROTOCOLS, SIV, Record::new(records::NTP_PORT, &[0, 0])],
        &[PROTOCOLS, SIV, Record::new(records::NTP_PORT, &[123])],
        &[PROTOCOLS, SIV, Record::new(records::NTP_SERVER, b"")],
    ] {
        assert_eq!(refused(request), bad, "{request:?}");
    }
    assert_eq!(refused(&[PROTOCOLS, SIV, Record::new(0x3fff, b"what")]).0, "ok");
}

#[test]
fn our_own_faults_and_silence() {
    let reply = server(NtpService::default()).receive(&message(&[PROTOCOLS, SIV]), &mut Broken).unwrap();
    assert_eq!(reply.outcome.label(), "internal-error");
    assert_eq!(told(&reply.octets), [(2, vec![0, 2], true)]);
    for (reply, label) in [(KeReply::timeout(), "timeout"), (KeReply::cut_short(), "cut-short")] {
        assert_eq!((reply.outcome.label(), told(&reply.octets)), (label, vec![(2, vec![0, 1], true)]));
    }
}

#[test]
fn a_request_may_come_octet_by_octet_up_to_its_limit() {
    let mut waiting = server(NtpService::default());
    let request = message(&[PROTOCOLS, SIV]);
    let (last, before) = request.split_last().unwrap();
    assert!(before.iter().all(|octet| waiting.receive(&[*octet], &mut Told).is_none()));
    assert_eq!(waiting.receive(&[*last], &mut Told).unwrap().outcome, Outcome::Ok);
    let filler = Record { kind: 0x3fff, body: &[0; records::MAX_REQUEST - 4 - 6 - 6 - 4], critical: false };
    assert_eq!(refused(&[PROTOCOLS, SIV, filler]).0, "ok");
    let filler = Record { body: &[0; records::MAX_REQUEST - 4 - 6 - 6 - 3], ..filler };
    assert_eq!(refused(&[PROTOCOLS, SIV, filler]).0, "bad-request");
}

#[test]
fn a_wish_is_granted_if_it_names_what_is_served() {
    let others = vec![endpoint("192.0.2.1", 123), endpoint("ntp.example", 4123), endpoint("2001:db8::1", 123)];
    let service = NtpService { default: endpoint("time.example", 1123), others };
    let default = [("time.example", Some(1123))];
    for (host, port, expected) in [
        ("", None, default[0]),
        ("192.0.2.1", None, ("192.0.2.1", None)),
        ("NTP.example.", None, ("ntp.example", Some(4123))),
        ("2001:DB8:0::1", Some(123), ("2001:db8::1", None)),
        ("2001:db8::1", Some(124), default[0]),
        ("other.example", None, default[0]),
        ("", Some(4123), ("ntp.example", Some(4123))),
    ] {
        let port: Option<[u8; 2]> = port.map(u16::to_be_bytes);
        let mut request = vec![PROTOCOLS, SIV];
        if !host.is_empty() {
            request.push(Record::critical(records::NTP_SERVER, host.as_bytes()));
        }
        if let Some(port) = &port {
            request.push(Record::critical(records::NTP_PORT, port));
        }
        let told = told(&asked(service.clone(), &request).octets);
        let mut expected_told = vec![(6, expected.0.as_bytes().to_vec(), true)];
        expected_told.extend(expected.1.map(|port: u16| (7, port.to_be_bytes().to_vec(), true)));
        assert_eq!(told[2..told.len() - 8], expected_told, "{host} {port:?}");
    }
}

#[test]
fn hosts_as_python_reads_and_writes_them() {
    for (body, host) in [
        ("Time.Example.", "time.example"),
        ("_ntp._udp.x-y", "_ntp._udp.x-y"),
        ("1.example", "1.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("1:0:0:2:0:0:0:3", "1:0:0:2::3"),
        ("1:2:3:4:5:6:7::", "1:2:3:4:5:6:7:0"),
        ("::ffff:192.0.2.1", "::ffff:c000:201"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
    ] {
        assert_eq!(host_of(body.as_bytes()).as_deref(), Ok(host));
    }
    for body in [
        "",
        ".",
        "..",
        "a..",
        ".a",
        "a..b",
        "-a",
        "a-",
        "a b",
        "a.1",
        "1",
        "192.0.2.01",
        "192.0.2.256",
        "1.2.3.4.",
        "0.0.0.0",
        "224.0.0.1",
        "::",
        "ff02::1",
        "fe80::1%eth0",
        "1:2:3:4:5:6:7:8:9",
        "::1.2.3",
        "\u{e4}.example",
    ] {
        assert_eq!(host_of(body.as_bytes()), Err(WireError), "{body}");
    }
    assert!(host_of(&[b'a'; 63]).is_ok() && host_of(&[b'a'; 64]).is_err());
    let longest = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
    assert!(host_of(longest.as_bytes()).is_ok() && host_of(format!("{longest}d").as_bytes()).is_err());
}
