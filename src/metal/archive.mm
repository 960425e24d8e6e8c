#import "metal/archive.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "metal/build_facts.h"
#include "metal/cache_folder.h"
#include "metal/switches.h"
#import "metal/text.h"

namespace umfa::metal {
namespace {

/// Folders of other GPUs, systems and versions of umfa are removed when they have not changed for so
/// long.
constexpr std::chrono::hours kept_for(24 * 60);

/// Notes that a process reads an archive. If the process ends meanwhile, the note stays, and nobody
/// reads that archive again: a driver may crash on an archive that it wrote itself.
class Reading {
public:
    explicit Reading(const std::string& archive) : note_(archive + ".reading") {
        const int made = open(note_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        const int opened = made >= 0 ? made : open(note_.c_str(), O_RDWR | O_CLOEXEC);
        if (opened < 0) return;
        // Who made the note waits for those that only look at it.
        const bool locked = flock(opened, made >= 0 ? LOCK_EX : LOCK_EX | LOCK_NB) == 0;
        // Another's note: its maker reads now, or ended; or has just removed it.
        struct stat facts{};
        const bool mine =
            locked && fstat(opened, &facts) == 0 && (made >= 0 || facts.st_nlink == 0);
        if (mine)
            note_of_ = opened;
        else
            close(opened);
    }
    ~Reading() {
        if (note_of_ < 0) return;
        std::remove(note_.c_str());
        close(note_of_);
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;
    bool allowed() const { return note_of_ >= 0; }

private:
    std::string note_;
    int note_of_ = -1;
};

void remove_old_folders(const std::filesystem::path& beside) {
    std::error_code trouble;
    const auto now = std::filesystem::file_time_type::clock::now();
    for (const auto& entry : std::filesystem::directory_iterator(beside.parent_path(), trouble)) {
        const bool archives = entry.path().filename().string().rfind("pipelines-", 0) == 0;
        if (!archives || entry.path() == beside) continue;
        const auto changed = entry.last_write_time(trouble);
        if (!trouble && now - changed > kept_for)
            std::filesystem::remove_all(entry.path(), trouble);
    }
}

NSURL* url_of(const std::string& path) { return [NSURL fileURLWithPath:ns_string(path)]; }

id<MTLBinaryArchive> open_archive(const Gpu& gpu, NSURL* url) {
    MTLBinaryArchiveDescriptor* descriptor = [MTLBinaryArchiveDescriptor new];
    descriptor.url = url;
    NSError* error = nil;
    return [gpu.device newBinaryArchiveWithDescriptor:descriptor error:&error];
}

void use(MTLComputePipelineDescriptor* descriptor, id<MTLBinaryArchive> archive) {
    descriptor.binaryArchives = archive ? [NSArray arrayWithObject:archive] : nil;
}

}  // namespace

PipelineArchive::PipelineArchive(const Gpu& gpu, const std::string& pipeline) : gpu_(gpu) {
    if (!is_on(archive_switch)) return;
    const std::string folder = cache_folder();
    if (folder.empty()) return;
    const std::string machine =
        "umfa " + kernels_text() + "; " + gpu.name + ", " + gpu.architecture + "; " + system_text();
    key_ = "umfa pipeline 1\nmachine " + one_line(machine) + "\npipeline " + one_line(pipeline) +
           "\ncontent ";
    file_ = folder + "/pipelines-" + digest(machine) + "/" + digest(pipeline);
}

id<MTLComputePipelineState> PipelineArchive::read(MTLComputePipelineDescriptor* descriptor) const {
    if (file_.empty()) return nil;
    const std::optional<std::string> record = checked_content(file_ + ".txt", key_);
    if (!record) return nil;
    const std::string path = file_ + ".archive";
    // Metal is not given what is damaged.
    if (*record != key_ + digest(content_of(path)) + "\n") return nil;
    const Reading reading(file_);
    if (!reading.allowed()) return nil;
    id<MTLBinaryArchive> archive = open_archive(gpu_, url_of(path));
    if (!archive) return nil;
    use(descriptor, archive);
    NSError* error = nil;
    id<MTLComputePipelineState> state =
        [gpu_.device newComputePipelineStateWithDescriptor:descriptor
                                                   options:MTLPipelineOptionFailOnBinaryArchiveMiss
                                                reflection:nil
                                                     error:&error];
    use(descriptor, nil);
    return state;
}

id<MTLBinaryArchive> PipelineArchive::compile(MTLComputePipelineDescriptor* descriptor) const {
    if (file_.empty()) return nil;
    id<MTLBinaryArchive> archive = open_archive(gpu_, nil);
    NSError* error = nil;
    if (![archive addComputePipelineFunctionsWithDescriptor:descriptor error:&error]) return nil;
    use(descriptor, archive);
    return archive;
}

void PipelineArchive::write(id<MTLBinaryArchive> archive) const {
    const std::string folder = file_.substr(0, file_.rfind('/'));
    const bool is_new = access(folder.c_str(), F_OK) != 0;
    if (!make_folder(folder)) return;
    if (is_new) remove_old_folders(folder);
    // The archive first: a record without its archive is as good as none.
    const std::string part = file_ + "." + std::to_string(getpid()), path = file_ + ".archive";
    NSError* error = nil;
    if (![archive serializeToURL:url_of(part) error:&error]) {
        std::remove(part.c_str());
        return;
    }
    const std::string record = key_ + digest(content_of(part)) + "\n";
    if (std::rename(part.c_str(), path.c_str()) != 0) {
        std::remove(part.c_str());
        return;
    }
    replace_checked(file_ + ".txt", record);
}

}  // namespace umfa::metal
