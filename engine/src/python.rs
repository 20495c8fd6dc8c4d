//! What Python sees: `nts_engine.pyi` says what each of these is.

#![allow(clippy::needless_pass_by_value)] // what comes from Python is made for the call

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use socket2::{SockRef, Type};

use crate::access::{NoPrefix, Prefix};
use crate::admission;
use crate::aead::AeadId;
use crate::batch;
use crate::cookies;
use crate::ke::{self, NtpEndpoint, NtpService};
use crate::ke_server::{self, KeThreads, ServiceAt};
use crate::ntp_server::{self, NtpThreads, ROLES, Shared};
use crate::packet::ClockState;
use crate::server::{self, Kiss, LANES, Place, Reply, Request, World};
use crate::tls::{self, PemPair};

/// Of either kind; as many as an agent may have.
const MOST_THREADS: usize = 64;

#[pyclass(frozen)]
struct Keyring(Arc<cookies::Keyring>);

#[pymethods]
impl Keyring {
    #[new]
    fn new(keys: Vec<(u16, Vec<u8>)>) -> PyResult<Self> {
        let keys: Vec<_> = keys.into_iter().map(|(id, key)| (id, zeroize::Zeroizing::new(key))).collect();
        cookies::Keyring::new(&keys)
            .map(|ring| Self(Arc::new(ring)))
            .ok_or_else(|| PyValueError::new_err("a keyring takes two or more keys of 32 octets with different ids"))
    }
}

#[pyclass(frozen)]
struct Clock {
    state: ClockState,
    offset_ns: i64,
}

#[pymethods]
impl Clock {
    #[new]
    #[pyo3(signature = (*, leap, stratum, precision, root_delay, root_dispersion, reference_id, reference, offset_ns=0))]
    #[allow(clippy::too_many_arguments)] // named ones
    fn new(
        leap: u8,
        stratum: u8,
        precision: i8,
        root_delay: u32,
        root_dispersion: u32,
        reference_id: [u8; 4],
        reference: u64,
        offset_ns: i64,
    ) -> PyResult<Self> {
        if leap > 3 {
            return Err(PyValueError::new_err(format!("a leap indicator of {leap} is not between 0 and 3")));
        }
        let state = ClockState { leap, stratum, precision, root_delay, root_dispersion, reference_id, reference };
        Ok(Self { state, offset_ns })
    }
}

impl Clock {
    fn until(&self, good_until: Option<Instant>) -> Arc<ntp_server::Clock> {
        Arc::new(ntp_server::Clock { state: self.state, offset_ns: self.offset_ns, good_until })
    }
}

#[pyclass(frozen)]
struct Limits(admission::Limits);

#[pymethods]
impl Limits {
    #[new]
    #[pyo3(signature = (
        *, allow, deny, kiss_denied, ntp_interval_ns, ntp_burst, ntp_leak, ntp_kod, ntp_pps, kiss_above, ke_connections,
        ke_per_address, ke_per_prefix, ke_interval_ns, ke_burst, ke_per_second,
    ))]
    #[allow(clippy::too_many_arguments)] // named ones
    fn new(
        allow: Vec<String>,
        deny: Vec<String>,
        kiss_denied: bool,
        ntp_interval_ns: Option<i64>,
        ntp_burst: u32,
        ntp_leak: u32,
        ntp_kod: u32,
        ntp_pps: Option<f64>,
        kiss_above: bool,
        ke_connections: usize,
        ke_per_address: usize,
        ke_per_prefix: usize,
        ke_interval_ns: Option<i64>,
        ke_burst: u32,
        ke_per_second: Option<f64>,
    ) -> PyResult<Self> {
        let limits = admission::Limits {
            allow: prefixes(&allow)?,
            deny: prefixes(&deny)?,
            kiss_denied,
            ntp_interval_ns,
            ntp_burst,
            ntp_leak,
            ntp_kod,
            ntp_pps,
            kiss_above,
            ke_connections,
            ke_per_address,
            ke_per_prefix,
            ke_interval_ns,
            ke_burst,
            ke_per_second,
        };
        limits.access().map_err(invalid)?;
        Ok(Self(limits))
    }
}

fn prefixes(texts: &[String]) -> PyResult<Vec<Prefix>> {
    texts.iter().map(|text| text.parse().map_err(|error: NoPrefix| invalid(error))).collect()
}

#[pyclass(frozen, get_all)]
struct Counts {
    ntp: Py<PyDict>,
    ke: Py<PyDict>,
    opened: Py<PyDict>,
    sealed: u64,
    forgotten: u64,
    ke_open: u64,
}

#[pyclass(frozen)]
struct Credentials(Arc<tls::Credentials>);

#[pymethods]
impl Credentials {
    #[new]
    fn new(pairs: Vec<(String, Vec<String>, String, String)>) -> PyResult<Self> {
        let pairs: Vec<_> =
            pairs.into_iter().map(|(name, host_names, chain, key)| PemPair { name, host_names, chain, key }).collect();
        tls::Credentials::new(&pairs).map(|ready| Self(ready.into())).map_err(invalid)
    }
}

type Endpoint = (Option<String>, u16);
type Service = (Endpoint, Vec<Endpoint>);

fn ntp_service((default, others): Service) -> NtpService {
    let endpoint = |(host, port)| NtpEndpoint { host, port };
    NtpService { default: endpoint(default), others: others.into_iter().map(endpoint).collect() }
}

/// Asks Python; what goes wrong there is told as what nobody can handle.
fn asking(service: Py<PyAny>) -> ServiceAt {
    Arc::new(move |local, names| {
        Python::attach(|py| {
            let asked = PyTuple::new(py, names).and_then(|names| service.call1(py, (local, names)));
            match asked.and_then(|found| found.extract::<Service>(py)) {
                Ok(found) => Some(ntp_service(found)),
                Err(error) => {
                    error.write_unraisable(py, Some(service.bind(py)));
                    None
                }
            }
        })
    })
}

/// None of its locks is held while somebody waits for a thread: that thread may be waiting for the interpreter's lock.
#[pyclass(frozen)]
struct Engine {
    shared: Arc<Shared>,
    ntp: NtpThreads,
    ke: KeThreads,
    threads: usize,
    places: AtomicUsize,
}

fn invalid(error: impl ToString) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Sockets that were handed over are closed also when they cannot be used.
fn take_over(descriptors: &[i32], kind: Type, threads: usize) -> PyResult<Vec<OwnedFd>> {
    // One that is named twice has one owner all the same.
    let distinct = (0..descriptors.len()).filter(|&at| !descriptors[..at].contains(&descriptors[at]));
    let taken: Vec<_> = distinct.map(|at| batch::take_over(descriptors[at])).collect();
    let sockets = taken.into_iter().collect::<Result<Vec<_>, _>>()?;
    for socket in &sockets {
        // From another kind every receive would fail, and at once.
        if SockRef::from(socket).r#type()? != kind {
            return Err(std::io::Error::other("a socket of another type").into());
        }
    }
    if sockets.len() == threads {
        Ok(sockets)
    } else {
        Err(invalid(format!("{} sockets for {threads} threads", sockets.len())))
    }
}

/// The counts that are not zero, by their labels.
fn by_label<'a>(py: Python<'_>, counts: impl Iterator<Item = (&'a str, u64)>) -> PyResult<Py<PyDict>> {
    let found = PyDict::new(py);
    for (label, count) in counts.filter(|(_, count)| *count > 0) {
        let before = found.get_item(label)?.map_or(Ok(0), |each| each.extract::<u64>())?;
        found.set_item(label, before + count)?;
    }
    Ok(found.unbind())
}

#[pymethods]
impl Engine {
    #[new]
    fn new(threads: usize, limits: &Limits, aead: Vec<u16>, keyring: &Keyring, clock: &Clock) -> PyResult<Self> {
        let preference = algorithms(&aead)?;
        if !(1..=MOST_THREADS).contains(&threads) {
            return Err(invalid(format!("an engine takes 1 to {MOST_THREADS} threads, not {threads}")));
        }
        let (keyring, clock) = (ArcSwap::new(keyring.0.clone()), ArcSwap::new(clock.until(None)));
        let shared = Arc::new(Shared { keyring, clock });
        let ntp = NtpThreads::start(threads, &limits.0, &shared)?;
        let ke = KeThreads::start(threads, &limits.0, &preference, &shared)?;
        Ok(Self { shared, ntp, ke, threads, places: AtomicUsize::new(0) })
    }

    fn use_keyring(&self, keyring: &Keyring) {
        self.shared.keyring.store(keyring.0.clone());
    }

    fn use_clock(&self, clock: &Clock, good_for_ns: u64) {
        self.shared.clock.store(clock.until(Some(Instant::now() + Duration::from_nanos(good_for_ns))));
    }

    fn use_credentials(&self, credentials: &Credentials) {
        self.ke.use_credentials(credentials.0.clone());
    }

    fn listen_ntp(&self, py: Python<'_>, descriptors: Vec<i32>) -> PyResult<usize> {
        let sockets = take_over(&descriptors, Type::DGRAM, self.threads)?;
        let number = self.places.fetch_add(1, Ordering::Relaxed);
        py.detach(|| self.ntp.listen(number, sockets))?;
        Ok(number)
    }

    fn listen_ke(&self, py: Python<'_>, descriptors: Vec<i32>, service: Py<PyAny>) -> PyResult<usize> {
        let sockets = take_over(&descriptors, Type::STREAM, self.threads)?;
        let number = self.places.fetch_add(1, Ordering::Relaxed);
        py.detach(|| self.ke.listen(number, sockets, &asking(service)))?;
        Ok(number)
    }

    fn forget_services(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.ke.forget_services())?)
    }

    fn leave(&self, py: Python<'_>, number: usize) -> PyResult<()> {
        Ok(py.detach(|| self.ntp.leave(number).and(self.ke.leave(number)))?)
    }

    #[getter]
    fn counts(&self, py: Python<'_>) -> PyResult<Counts> {
        let total = |read: &dyn Fn(&ntp_server::Counts) -> u64| self.ntp.counts().map(read).sum::<u64>();
        let ke = || self.ke.counts().flat_map(ke_server::Counts::by_label);
        let established: u64 =
            ke().filter(|(label, _)| *label == ke::Outcome::Ok.label()).map(|(_, count)| count).sum();
        Ok(Counts {
            ntp: by_label(py, self.ntp.counts().flat_map(ntp_server::Counts::by_label))?,
            ke: by_label(py, ke())?,
            opened: by_label(py, self.ntp.counts().flat_map(ntp_server::Counts::opened_by_role))?,
            sealed: total(&|counts| counts.sealed.get()) + cookies::MAX_COOKIES as u64 * established,
            forgotten: total(&|counts| counts.forgotten.get()),
            ke_open: self.ke.counts().map(ke_server::Counts::open).sum(),
        })
    }

    #[getter]
    fn threads(&self) -> usize {
        self.ntp.alive().min(self.ke.alive())
    }

    #[getter]
    fn fault(&self) -> Option<String> {
        self.ntp.fault().or_else(|| self.ke.fault())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            self.ke.close();
            self.ntp.close();
        });
    }
}

impl Drop for Engine {
    /// A thread that asks Python something must get its answer before it can end.
    fn drop(&mut self) {
        Python::attach(|py| self.close(py));
    }
}

/// The algorithms of these numbers, in this order.
fn algorithms(numbers: &[u16]) -> PyResult<Vec<AeadId>> {
    let known =
        |&number| AeadId::of(number).ok_or_else(|| invalid(format!("{number} is no AEAD algorithm known here")));
    let found = numbers.iter().map(known).collect::<PyResult<Vec<_>>>()?;
    if found.contains(&AeadId::SivCmac256) {
        Ok(found)
    } else {
        Err(invalid("15 (AES-SIV-CMAC-256) has to be among them"))
    }
}

/// A time that stands still, and randomness that was given.
struct Given<'a> {
    now: i64,
    random: &'a [Vec<u8>],
    /// What has left, by lane.
    left: [Option<Vec<u8>>; LANES],
}

impl World for Given<'_> {
    fn departure(&mut self, _place: Place) -> i64 {
        self.now
    }

    fn together(&self) -> usize {
        LANES
    }

    fn leave<'a>(&mut self, answers: impl Iterator<Item = (usize, &'a Reply)>) {
        for (lane, reply) in answers {
            self.left[lane].get_or_insert_default().extend(&reply.octets[..reply.length]);
        }
    }

    fn random(&mut self, lane: usize, room: &mut [u8]) {
        for (into, octet) in room.iter_mut().zip(&self.random[lane]) {
            *into = *octet;
        }
    }
}

fn kiss(code: Option<&str>) -> PyResult<Option<Kiss>> {
    match code {
        None => Ok(None),
        Some("RATE") => Ok(Some(Kiss::Rate)),
        Some("DENY") => Ok(Some(Kiss::Deny)),
        Some(other) => Err(PyValueError::new_err(format!("{other:?} is not RATE or DENY"))),
    }
}

type Answer<'py> = (&'static str, Option<Bound<'py, PyBytes>>, Option<&'static str>, usize);

#[pyfunction]
#[pyo3(signature = (requests, random, *, keyring, clock, received, now))]
fn respond<'py>(
    py: Python<'py>,
    requests: Vec<(Vec<u8>, Option<String>)>,
    random: Vec<Vec<u8>>,
    keyring: &Keyring,
    clock: &Clock,
    received: i64,
    now: i64,
) -> PyResult<Vec<Answer<'py>>> {
    if random.len() != requests.len() || random.iter().any(|octets| octets.len() < server::MOST_RANDOM) {
        return Err(PyValueError::new_err(format!("each request takes {} random octets", server::MOST_RANDOM)));
    }
    let mut found = Vec::with_capacity(requests.len());
    let mut replies: Vec<_> = (0..LANES).map(|_| Reply::default()).collect();
    for (requests, random) in requests.chunks(LANES).zip(random.chunks(LANES)) {
        let asked = requests
            .iter()
            .map(|(datagram, code)| Ok(Request { datagram, received, kiss: kiss(code.as_deref())? }))
            .collect::<PyResult<Vec<_>>>()?;
        let mut world = Given { now, random, left: Default::default() };
        server::respond(&keyring.0, &clock.state, &asked, &mut replies, &mut world);
        found.extend(replies[..asked.len()].iter().zip(world.left).map(|(reply, left)| {
            let octets = left.map(|octets| PyBytes::new(py, &octets));
            let role = reply.opened.and_then(|role| ROLES.iter().find(|(each, _)| *each == role));
            (reply.outcome.label(), octets, role.map(|(_, label)| *label), reply.sealed)
        }));
    }
    Ok(found)
}

/// What `ipaddress` calls packed.
fn address(octets: &[u8]) -> PyResult<IpAddr> {
    <[u8; 4]>::try_from(octets)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from))
        .map_err(|_| PyValueError::new_err("an address has 4 or 16 octets"))
}

#[pyclass(frozen)]
struct Admission(Mutex<admission::Admission>);

#[pymethods]
impl Admission {
    #[new]
    fn new(limits: &Limits, random: Vec<u8>) -> PyResult<Self> {
        let words: Vec<_> = random.as_chunks().0.iter().map(|word| u32::from_be_bytes(*word)).collect();
        if words.is_empty() {
            return Err(PyValueError::new_err("what is drawn takes four random octets or more"));
        }
        let mut words = words.into_iter().cycle();
        let draw = Box::new(move || words.next().unwrap_or_default());
        let admission = limits.0.admission(draw).map_err(invalid)?;
        admission.map(|each| Self(Mutex::new(each))).ok_or_else(|| PyValueError::new_err("limits that limit nothing"))
    }

    fn judge(&self, address: &[u8], now: i64) -> PyResult<&'static str> {
        Ok(self.0.lock().map_err(poisoned)?.judge(self::address(address)?, now).label())
    }

    #[getter]
    fn forgotten(&self) -> PyResult<u64> {
        Ok(self.0.lock().map_err(poisoned)?.forgotten())
    }
}

#[pyclass(frozen)]
struct Slots(Mutex<admission::Slots>);

#[pymethods]
impl Slots {
    #[new]
    #[pyo3(signature = (total, *, per_address, per_prefix))]
    fn new(total: usize, per_address: usize, per_prefix: usize) -> Self {
        Self(Mutex::new(admission::Slots::new(total, per_address, per_prefix)))
    }

    fn take(&self, address: &[u8]) -> PyResult<Option<&'static str>> {
        Ok(self.0.lock().map_err(poisoned)?.take(self::address(address)?).err().map(admission::Refused::label))
    }

    fn give_back(&self, address: &[u8]) -> PyResult<()> {
        self.0.lock().map_err(poisoned)?.give_back(self::address(address)?);
        Ok(())
    }
}

/// TLS and randomness of a test.
struct Lent<'py> {
    export: Bound<'py, PyAny>,
    random: Vec<u8>,
    fault: Option<PyErr>,
}

impl ke::Session for Lent<'_> {
    fn export(&mut self, context: &[u8], key: &mut [u8]) -> Result<(), ke::NoKeys> {
        let made = self.export.call1((PyBytes::new(self.export.py(), context), key.len()));
        match made.and_then(|octets| octets.extract::<Vec<u8>>()) {
            Ok(octets) if octets.len() == key.len() => {
                key.copy_from_slice(&octets);
                Ok(())
            }
            Ok(_) => Err(ke::NoKeys),
            Err(error) => {
                self.fault = Some(error);
                Err(ke::NoKeys)
            }
        }
    }

    fn random(&mut self, room: &mut [u8]) {
        for (into, octet) in room.iter_mut().zip(&self.random) {
            *into = *octet;
        }
    }
}

#[pyclass(frozen)]
struct KeExchange {
    server: Mutex<ke::KeServer>,
    export: Py<PyAny>,
    random: Vec<u8>,
}

#[pymethods]
impl KeExchange {
    #[new]
    fn new(
        keyring: &Keyring,
        service: Service,
        preference: Vec<u16>,
        export: Py<PyAny>,
        random: Vec<u8>,
    ) -> PyResult<Self> {
        let terms = ke::KeTerms {
            keyring: keyring.0.clone(),
            service: Arc::new(ntp_service(service)),
            preference: algorithms(&preference)?.into(),
        };
        Ok(Self { server: Mutex::new(ke::KeServer::new(terms)), export, random })
    }

    fn receive<'py>(&self, py: Python<'py>, plaintext: &[u8]) -> PyResult<Option<(Bound<'py, PyBytes>, &'static str)>> {
        let mut lent = Lent { export: self.export.bind(py).clone(), random: self.random.clone(), fault: None };
        let reply = self.server.lock().map_err(poisoned)?.receive(plaintext, &mut lent);
        match lent.fault {
            Some(fault) => Err(fault),
            None => Ok(reply.map(|reply| (PyBytes::new(py, &reply.octets), reply.outcome.label()))),
        }
    }
}

fn poisoned<E>(_: E) -> PyErr {
    PyRuntimeError::new_err("it has failed before")
}

#[pymodule]
mod nts_engine {
    #[pymodule_export]
    use super::{Admission, Clock, Counts, Credentials, Engine, KeExchange, Keyring, Limits, Slots, respond};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
