//! Compiles the kernels of `cuda/` and writes the table of their images.
//!
//! | variable | |
//! |---|---|
//! | `FASTMOE_SKIP_CUDA=1` | no kernels |
//! | `FASTMOE_CUDA_ARCHS` | a list out of 80,90a,100f,120f,ptx, or `native` for this machine's GPUs, or `all`; then nvcc must be there |
//! | `FASTMOE_NVCC_ROOT` | the folder that has `bin/nvcc`; without it the Python environment is asked, then `CUDA_HOME` |

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

#[path = "src/arch.rs"]
mod arch;
#[path = "build/image.rs"]
mod image;
#[path = "build/ptxas.rs"]
mod ptxas;
#[path = "build/toolchain.rs"]
mod toolchain;

use arch::Arch;
use image::{Compiler, Image};
use rayon::ThreadPoolBuilder;
use rayon::iter::Either;
use rayon::prelude::*;

fn main() {
    for name in ["FASTMOE_SKIP_CUDA", "FASTMOE_CUDA_ARCHS", "FASTMOE_NVCC_ROOT", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
    for path in ["build.rs", "build", "src/arch.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    match images(&sources, &out) {
        Ok(images) => fs::write(out.join("images.rs"), table(&images)).expect("OUT_DIR is writable"),
        Err(error) => {
            for line in error.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}

fn images(sources: &Path, out: &Path) -> Result<Vec<Image>, String> {
    let archs = wanted_archs()?;
    if archs.is_empty() {
        return Ok(vec![]);
    }
    let nvcc = match toolchain::find() {
        Ok(nvcc) => nvcc,
        Err(why) if env::var_os("FASTMOE_CUDA_ARCHS").is_none() => {
            println!("cargo::warning=no GPU kernels in this build: {why}");
            return Ok(vec![]);
        }
        Err(why) => return Err(format!("FASTMOE_CUDA_ARCHS asks for GPU kernels, but there is {why}")),
    };
    // What an image can depend on; the emulator and the tests of the kernels are not among it.
    for path in ["ptx/ptx.cuh", "ptx/device", "tile", "kernels"] {
        println!("cargo::rerun-if-changed={}", sources.join(path).display());
    }
    let cache = cache_folder(out)?;
    // Two builds share the cache; one of them compiles.
    let lock = File::create(cache.join("lock")).and_then(|lock| lock.lock().map(|()| lock));
    let _lock = lock.map_err(|error| format!("{}: {error}", cache.display()))?;

    let compiler = Compiler { nvcc: &nvcc, sources, cache: &cache };
    let jobs = jobs(sources, &archs)?;
    let threads = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| error.to_string())?;
    let compile = |(family, code): &(String, &str)| match compiler.images(family, code) {
        Ok(images) => Either::Left(images),
        Err(error) => Either::Right(error),
    };
    let (images, errors): (Vec<_>, Vec<_>) = pool.install(|| jobs.par_iter().partition_map(compile));
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    Ok(images.into_iter().flatten().filter(|image| archs.contains(&image.arch)).collect())
}

/// The targets that `FASTMOE_SKIP_CUDA` and `FASTMOE_CUDA_ARCHS` leave.
fn wanted_archs() -> Result<Vec<Arch>, String> {
    if env::var("FASTMOE_SKIP_CUDA").is_ok_and(|skip| !matches!(skip.as_str(), "" | "0")) {
        return Ok(vec![]);
    }
    match env::var("FASTMOE_CUDA_ARCHS").as_deref() {
        Err(_) | Ok("all") => Ok(Arch::ALL.to_vec()),
        Ok("native") => Ok(toolchain::native()),
        Ok(names) => {
            names.split(',').map(|name| Arch::from_name(name.trim()).ok_or_else(|| unknown(name))).collect()
        }
    }
}

fn unknown(name: &str) -> String {
    let known = Arch::ALL.map(Arch::name).join(", ");
    format!("FASTMOE_CUDA_ARCHS: {name:?} is not a target; they are {known}, or all or native alone")
}

/// Families and codes to compile. Every file of `cuda/kernels` is a family.
fn jobs(sources: &Path, archs: &[Arch]) -> Result<Vec<(String, &'static str)>, String> {
    let folder = sources.join("kernels");
    if !folder.is_dir() {
        return Ok(vec![]);
    }
    let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let sources = paths.filter(|path| path.extension().is_some_and(|extension| extension == "cu"));
    let mut families: Vec<String> =
        sources.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    families.sort();
    let jobs = families.iter().flat_map(|family| {
        let codes: BTreeSet<_> =
            archs.iter().filter(|arch| arch.is_for(family)).map(|arch| arch.code()).collect();
        codes.into_iter().map(|code| (family.clone(), code))
    });
    Ok(jobs.collect())
}

/// `target/kernels`, which all profiles share.
fn cache_folder(out: &Path) -> Result<PathBuf, String> {
    // OUT_DIR is target/<profile>/build/<package>/out, with the target triple in front of the profile or without.
    let profile = out.ancestors().nth(3).expect("OUT_DIR lies in target/");
    let cache = profile.with_file_name("kernels");
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    Ok(cache)
}

/// The expression that `IMAGES` is.
fn table(images: &[Image]) -> String {
    let mut table = String::from("&[\n");
    for Image { family, arch, path, kernels } in images {
        let path = path.display();
        writeln!(table, "Image {{ family: {family:?}, arch: Arch::{arch:?}, zstd: include_bytes!(r\"{path}\"), kernels: &{kernels:?} }},")
            .expect("a String takes everything");
    }
    table + "]"
}
