// A map whose values are expensive to build. The first caller builds a value; concurrent callers of
// the same key wait for it; callers of other keys do not wait.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace umfa::metal {

template <class Value>
class BuildOnce {
public:
    /// The value of `key`; `build()` makes it. When that throws, nothing is kept. `built`: counts
    /// calls of build().
    template <class Build>
    Value get(const std::string& key, Build&& build, int64_t* built = nullptr) {
        std::shared_ptr<Entry> entry;
        {
            const std::lock_guard guard(lock_);
            std::shared_ptr<Entry>& place = entries_[key];
            if (!place) place = std::make_shared<Entry>();
            entry = place;
        }
        const std::lock_guard guard(entry->lock);
        if (!entry->value) {
            entry->value = std::forward<Build>(build)();
            if (built) ++*built;
        }
        return *entry->value;
    }

    /// Whether a value was asked for, or claimed. Claims it.
    bool claim(const std::string& key) {
        const std::lock_guard guard(lock_);
        std::shared_ptr<Entry>& place = entries_[key];
        if (place) return true;
        place = std::make_shared<Entry>();
        return false;
    }

private:
    struct Entry {
        std::mutex lock;
        std::optional<Value> value;
    };
    std::mutex lock_;
    std::map<std::string, std::shared_ptr<Entry>> entries_;
};

}  // namespace umfa::metal
